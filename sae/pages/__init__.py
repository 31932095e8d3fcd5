"""What people look at: self-contained pages, plots, and tokens marked by how much they fire."""
