//! The command line beside serving: subcommands on images.

pub mod control;
pub mod image;
pub mod key;
pub mod size;
