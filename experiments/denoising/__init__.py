"""Gray photographs with Gaussian noise."""
