"""The embedded simulated sample: tissue, slide, counts and 10x files with a known truth."""
