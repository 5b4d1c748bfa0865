"""What a training run needs: data, losses, loops, run folders."""
