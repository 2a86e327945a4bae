"""Who carries out a step's orders: a real model, or a stand-in that only remembers."""
