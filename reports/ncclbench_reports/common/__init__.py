"""What several report formats share: data frames, wording and comparisons."""
