"""The MNIST autoencoder race."""
