"""What is shown of a run: arrays to pictures, series and pages, for the tab, the file and the notebook. No torch."""
