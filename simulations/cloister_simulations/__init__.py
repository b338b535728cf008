"""The same coordinator and hospital code on one machine."""
