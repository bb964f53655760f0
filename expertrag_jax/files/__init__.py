"""Files: which paths are read, how outputs are written whole, who may write, and what a foreign directory may say."""
