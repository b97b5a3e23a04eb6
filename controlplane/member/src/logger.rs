//! Consensus logs through slog; this hands its records to tracing.

use slog::{Drain, Logger, Never, OwnedKVList, Record};

pub(crate) fn to_tracing() -> Logger {
    Logger::root(Tracing, slog::o!())
}

struct Tracing;

impl Drain for Tracing {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, _values: &OwnedKVList) -> Result<(), Never> {
        let message = record.msg();
        match record.level() {
            slog::Level::Critical | slog::Level::Error => tracing::error!("consensus: {message}"),
            slog::Level::Warning => tracing::warn!("consensus: {message}"),
            // What it calls information is of interest to who debugs it.
            slog::Level::Info => tracing::debug!("consensus: {message}"),
            slog::Level::Debug | slog::Level::Trace => tracing::trace!("consensus: {message}"),
        }
        Ok(())
    }
}
