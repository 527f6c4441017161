"""The bundled pocket model's world: procedural scenes with exact captions, the checker that reads them, and the training stages."""
