//! Fetches what nobody has asked for, behind what somebody waits for, at a rate.

use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::fetcher::Shared;
use crate::overlay::Chain;

/// Bytes that the background fetches with one request.
const FILL_RUN: u64 = 1 << 20;
/// Bytes after which what the background fetched is made durable.
const FILL_FLUSH: u64 = 64 << 20;
/// How long the background waits after a failure.
const FILL_RETRY: Duration = Duration::from_secs(10);

impl Shared {
    // Fetches everything that isn't there, slowly.
    pub(super) fn fill(self: Arc<Self>, rate: u64) {
        let chunks = self.expected.bytes.div_ceil(self.chunk_bytes);
        let run = (FILL_RUN / self.chunk_bytes).max(1);
        let (mut chunk, mut unflushed) = (0, 0);
        while chunk < chunks {
            let Some(chain) = self.chain() else {
                if self.wait(Duration::from_secs(1)) {
                    return;
                }
                continue;
            };
            if !self.is_absent(&chain, chunk) {
                chunk += 1;
                continue;
            }
            let wanted = chunk..(chunk + run).min(chunks);
            let bytes = (wanted.end - wanted.start) * self.chunk_bytes;
            let began = Instant::now();
            let filled = self.fetch_slowly(chain, wanted);
            unflushed += bytes;
            if unflushed >= FILL_FLUSH && self.flush() {
                unflushed = 0;
            }
            let pause = if filled {
                let due = Duration::from_micros(bytes.saturating_mul(1_000_000) / rate.max(1));
                due.saturating_sub(began.elapsed())
            } else {
                FILL_RETRY
            };
            if self.wait(pause) {
                return;
            }
        }
        if self.flush() {
            tracing::info!(url = self.image.url(), "all of the image is here");
        }
    }

    // Doesn't hold on to the chain while it waits: the disk may be closed meanwhile.
    fn fetch_slowly(self: &Arc<Self>, chain: Arc<Chain>, chunks: Range<u64>) -> bool {
        let (sender, results) = mpsc::channel();
        let deadline = Instant::now() + self.patience;
        {
            let mut state = self.lock();
            let wanted = chunks.clone();
            state
                .plan
                .ahead(wanted, |chunk| self.is_absent(&chain, chunk));
            for chunk in chunks {
                let sender = sender.clone();
                let done = move |result| {
                    // Nobody listens any more after an earlier failure.
                    let _ = sender.send(result);
                };
                state.plan.wait_for(chunk, Box::new(done), deadline);
            }
            self.start_thread(&mut state);
        }
        drop((sender, chain));
        results.iter().all(|result: Result<(), i32>| result.is_ok())
    }

    fn flush(&self) -> bool {
        let flushed = self.chain().map(|chain| chain.flush());
        if let Some(Err(error)) = &flushed {
            tracing::warn!(%error, "what was fetched can't be made durable");
        }
        matches!(flushed, Some(Ok(())))
    }
}
