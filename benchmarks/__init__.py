"""The claims of the README, measured on the machine at hand. One file per claim; `make bench` runs them all."""
