"""Pipeline parallelism: stages, schedules, and how x0 reaches each stage."""
