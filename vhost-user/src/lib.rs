//! A vhost-user-blk backend on io_uring.
