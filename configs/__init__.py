"""Recipes shipped as package data: `sae-train --config NAME`."""
