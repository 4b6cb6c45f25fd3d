"""What every room uses: errors, files that are written atomically, configuration, processes."""
