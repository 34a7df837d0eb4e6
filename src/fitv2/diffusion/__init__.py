"""The mathematics between noise and data. It knows no files and no command line."""
