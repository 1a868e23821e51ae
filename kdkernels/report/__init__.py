"""Pages that show what models do: one self-contained HTML file each."""
