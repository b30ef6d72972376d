"""Who moves the data: one file a library, behind the seam in `base`."""
