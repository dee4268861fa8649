"""What every room uses: files, command lines, errors, statistics, pictures, W&B. It imports no other room."""
