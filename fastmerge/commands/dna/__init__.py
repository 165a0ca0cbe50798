"""The commands of DNA transfer."""
