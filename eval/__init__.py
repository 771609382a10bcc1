"""Programs with a measuring protocol in sight."""
