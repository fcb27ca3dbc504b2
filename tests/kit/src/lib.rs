//! The test kit: real servers as values, databases and accounts of one's own, polling with deadlines.
