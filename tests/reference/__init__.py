"""The published code of COW and DiffEditor, bug for bug, for comparison only: the product never imports it."""
