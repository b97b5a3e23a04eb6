//! The host agent keelsond and its command line client keelson.
