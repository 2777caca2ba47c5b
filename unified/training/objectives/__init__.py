"""Training objectives, one file each; a run sums those that its settings list, each times its weight."""
