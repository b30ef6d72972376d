"""The libraries that move the data: one file per library, behind the protocol in `base`."""
