"""What everything stands on: errors, files, settings, plug-ins, seeds, stores. Knows no tensor's meaning."""
