"""`launch doctor`: whether machines are fit for a run, found out on the machines themselves before one is started."""
