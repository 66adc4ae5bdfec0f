"""Where a job runs. A backend takes an open run folder and brings the run to its outcome."""
