"""What a step costs on hardware that need not be here: cost models, and the catalogue that they read."""
