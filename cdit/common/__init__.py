"""What every room uses: files, command lines, errors, statistics, pictures, W&B. It imports no room but
`cdit.worlds`, the names of the shipped worlds."""
