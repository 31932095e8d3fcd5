/* A table that is sorted, filtered and paged. */
