"""Reports to read: one file a report, and what they share in `rendering`."""
