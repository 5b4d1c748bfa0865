"""What is measured on images and embeddings. Imports networks and preprocessing."""
