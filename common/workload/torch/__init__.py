"""The networks of a workload, built with torch. Only this package of the room needs torch."""
