"""nn.Modules and their weights. No data files, no training."""
