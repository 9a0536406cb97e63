"""Where trials are carried out: `executor` is the seam, `local` does it in this process."""
