"""The step loop: requests in, orders out, events along the way. Holds no tensors."""
