//! What is to be fetched next: what somebody waits for, then what will be read soon. No threads,
//! no clock and no connections of its own.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Bytes that are read ahead of one reader at most.
const MAX_AHEAD: u64 = 8 << 20;
/// Bytes of one request to the server at most, unless a chunk is larger.
const MAX_RUN: u64 = 4 << 20;
/// Readers that are told from each other.
const READERS: usize = 4;
/// Requests that read ahead at the same time, so that there are threads left for who waits.
const MAX_AHEAD_RUNS: usize = 2;
/// How often a chunk that comes with a wrong checksum is asked for.
const CORRUPT_ATTEMPTS: u32 = 3;
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// Chunks that are fetched with one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The chunks.
    pub chunks: Range<u64>,
    /// Nobody waited for it when it began.
    pub ahead: bool,
}

/// Why a run ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It may succeed later.
    Temporary,
    /// The chunk's checksum was wrong.
    Corrupt,
    /// It will not succeed.
    Final,
}

/// Who waits for what, and what is under way.
#[derive(Debug)]
pub struct FetchPlan<W> {
    chunks: u64,
    ahead_chunks: u64,
    run_chunks: u64,
    wanted: HashMap<u64, Wanted<W>>,
    demand: VecDeque<u64>,
    ahead: VecDeque<Range<u64>>,
    ahead_runs: usize,
    readers: VecDeque<Reader>,
}

#[derive(Debug)]
struct Wanted<W> {
    /// And when each gives up.
    waiters: Vec<(W, Instant)>,
    attempts: u32,
    /// It is in `demand`, or was.
    urgent: bool,
    running: bool,
}

// One that reads chunk after chunk, and the window that was fetched ahead of it last.
#[derive(Debug)]
struct Reader {
    window: Range<u64>,
    size: u64,
}

impl<W> FetchPlan<W> {
    /// For an image of this many chunks.
    pub fn new(chunks: u64, chunk_bytes: u64) -> Self {
        Self {
            chunks,
            ahead_chunks: (MAX_AHEAD / chunk_bytes).max(1),
            run_chunks: (MAX_RUN / chunk_bytes).max(1),
            wanted: HashMap::new(),
            demand: VecDeque::new(),
            ahead: VecDeque::new(),
            ahead_runs: 0,
            readers: VecDeque::new(),
        }
    }

    /// Somebody waits for a chunk, until the deadline. Returns what to read ahead, if it is read
    /// in sequence.
    pub fn demand(&mut self, chunk: u64, waiter: W, deadline: Instant) -> Range<u64> {
        let entry = self.wanted.entry(chunk).or_insert_with(Wanted::new);
        // One that is to be read ahead becomes urgent.
        if !entry.running && !entry.urgent {
            self.demand.push_back(chunk);
        }
        entry.urgent = true;
        entry.waiters.push((waiter, deadline));
        self.read_ahead(chunk)
    }

    /// Wants chunks that nobody waits for yet. Those of them that are wanted already stay as they
    /// are.
    pub fn ahead(&mut self, chunks: Range<u64>, absent: impl Fn(u64) -> bool) {
        let mut first = None;
        for chunk in chunks.clone() {
            let new = !self.wanted.contains_key(&chunk) && absent(chunk);
            if new {
                self.wanted.insert(chunk, Wanted::new());
                first.get_or_insert(chunk);
            } else if let Some(first) = first.take() {
                self.ahead.push_back(first..chunk);
            }
        }
        if let Some(first) = first {
            self.ahead.push_back(first..chunks.end);
        }
    }

    /// Somebody waits for a chunk that was just wanted with [`ahead`](Self::ahead), and is in no
    /// hurry. False if it isn't wanted.
    pub fn wait_for(&mut self, chunk: u64, waiter: W, deadline: Instant) -> bool {
        let entry = self.wanted.get_mut(&chunk);
        entry.is_some_and(|entry| {
            entry.waiters.push((waiter, deadline));
            true
        })
    }

    /// The next run, until there is none that may start.
    pub fn start_next(&mut self) -> Option<Run> {
        while let Some(chunk) = self.demand.pop_front() {
            if self.start(chunk) {
                return Some(Run {
                    chunks: chunk..chunk + 1,
                    ahead: false,
                });
            }
        }
        if self.ahead_runs >= MAX_AHEAD_RUNS {
            return None;
        }
        while let Some(mut range) = self.ahead.pop_front() {
            let mut run = range.start..range.start;
            for chunk in range.by_ref() {
                if self.start(chunk) {
                    if run.is_empty() {
                        run = chunk..chunk;
                    }
                    run.end = chunk + 1;
                    if run.end - run.start >= self.run_chunks {
                        break;
                    }
                } else if !run.is_empty() {
                    break;
                }
            }
            if !range.is_empty() {
                self.ahead.push_front(range);
            }
            if !run.is_empty() {
                self.ahead_runs += 1;
                return Some(Run {
                    chunks: run,
                    ahead: true,
                });
            }
        }
        None
    }

    /// Whether [`start_next`](Self::start_next) may have something.
    pub fn can_start(&self) -> bool {
        !self.demand.is_empty() || self.ahead_runs < MAX_AHEAD_RUNS && !self.ahead.is_empty()
    }

    /// When the first who waits for a chunk gives up.
    pub fn deadline(&self, chunk: u64) -> Option<Instant> {
        let waiters = &self.wanted.get(&chunk)?.waiters;
        waiters.iter().map(|(_, deadline)| *deadline).min()
    }

    /// A chunk is there, or won't be. Returns who waited for it.
    pub fn settle(&mut self, chunk: u64) -> Vec<W> {
        let entry = self.wanted.remove(&chunk);
        let waiters = entry.map_or(Vec::new(), |entry| entry.waiters);
        waiters.into_iter().map(|(waiter, _)| waiter).collect()
    }

    /// A run has ended, with these chunks of it not settled and the first of them failed. Returns
    /// who has to be told of the failure, and how long to wait before the next run.
    pub fn end(
        &mut self,
        run: &Run,
        left: Range<u64>,
        failure: Failure,
        now: Instant,
    ) -> (Vec<W>, Option<Duration>) {
        if run.ahead {
            self.ahead_runs -= 1;
        }
        let (mut told, mut pause) = (Vec::new(), None);
        for chunk in left.clone().rev() {
            let Some(entry) = self.wanted.get_mut(&chunk) else {
                continue;
            };
            entry.running = false;
            let first = chunk == left.start;
            let late = entry
                .waiters
                .extract_if(.., |(_, deadline)| now >= *deadline);
            told.extend(late.map(|(waiter, _)| waiter));
            entry.attempts += u32::from(first);
            let hopeless = first
                && match failure {
                    Failure::Temporary => false,
                    Failure::Corrupt => entry.attempts >= CORRUPT_ATTEMPTS,
                    Failure::Final => true,
                };
            let Some(deadline) = entry.waiters.iter().map(|(_, deadline)| *deadline).min() else {
                self.wanted.remove(&chunk);
                continue;
            };
            if hopeless {
                told.extend(self.settle(chunk));
                continue;
            }
            if first {
                let doubled = FIRST_BACKOFF.saturating_mul(1 << (entry.attempts - 1).min(8));
                pause = Some(doubled.min(MAX_BACKOFF).min(deadline - now));
            }
            entry.urgent = true;
            self.demand.push_front(chunk);
        }
        (told, pause)
    }

    /// Forgets everything. Returns all who waited.
    pub fn clear(&mut self) -> Vec<W> {
        self.demand.clear();
        self.ahead.clear();
        let wanted = self.wanted.drain();
        let waiters = wanted.flat_map(|(_, entry)| entry.waiters);
        waiters.map(|(waiter, _)| waiter).collect()
    }

    // Whether it is wanted and not yet under way.
    fn start(&mut self, chunk: u64) -> bool {
        let entry = self.wanted.get_mut(&chunk);
        entry.is_some_and(|entry| !std::mem::replace(&mut entry.running, true))
    }

    fn read_ahead(&mut self, chunk: u64) -> Range<u64> {
        let known = self
            .readers
            .iter_mut()
            .find(|reader| reader.window.start <= chunk && chunk <= reader.window.end);
        let Some(reader) = known else {
            if self.readers.len() >= READERS {
                self.readers.pop_front();
            }
            self.readers.push_back(Reader {
                window: chunk + 1..chunk + 1,
                size: 1,
            });
            return 0..0;
        };
        // In the first half there is enough ahead.
        if chunk * 2 < reader.window.start + reader.window.end {
            return 0..0;
        }
        reader.size = (reader.size * 2).min(self.ahead_chunks);
        let start = reader.window.end.max(chunk + 1);
        reader.window = start..(start + reader.size).min(self.chunks);
        reader.window.start = reader.window.start.min(reader.window.end);
        reader.window.clone()
    }
}

impl<W> Wanted<W> {
    fn new() -> Self {
        Self {
            waiters: Vec::new(),
            attempts: 0,
            urgent: false,
            running: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 256 << 10;

    fn later() -> Instant {
        Instant::now() + Duration::from_mins(1)
    }

    #[test]
    fn a_chunk_is_fetched_once_for_all_who_wait() {
        let mut plan = FetchPlan::new(100, CHUNK);
        for waiter in 0..3 {
            assert!(plan.demand(7, waiter, later()).is_empty() || waiter > 0);
        }
        let run = plan.start_next().unwrap();
        assert_eq!(run.chunks, 7..8);
        plan.demand(7, 3, later());
        assert_eq!(plan.start_next(), None);
        assert_eq!(plan.settle(7), [0, 1, 2, 3]);
    }

    #[test]
    fn reading_in_sequence_is_read_ahead_up_to_a_limit() {
        let mut plan = FetchPlan::new(1000, CHUNK);
        let mut furthest = 0;
        let mut chunk = 0;
        while chunk < 900 {
            let ahead = plan.demand(chunk, (), later());
            assert!(ahead.end <= chunk + 2 + 2 * MAX_AHEAD / CHUNK);
            plan.ahead(ahead.clone(), |_| true);
            while let Some(run) = plan.start_next() {
                assert!(run.chunks.end - run.chunks.start <= MAX_RUN / CHUNK);
                for chunk in run.chunks.clone() {
                    plan.settle(chunk);
                    furthest = furthest.max(chunk);
                }
                plan.end(&run, 0..0, Failure::Final, Instant::now());
            }
            chunk = furthest + 1;
        }
        // Far fewer stops than chunks.
        assert_eq!(plan.readers.len(), 1);
        assert_eq!(plan.readers[0].size, MAX_AHEAD / CHUNK);
    }

    #[test]
    fn random_reads_are_not_read_ahead() {
        let mut plan = FetchPlan::new(1000, CHUNK);
        for chunk in [500, 3, 77, 900, 41, 600, 12] {
            assert!(plan.demand(chunk, (), later()).is_empty());
        }
    }

    #[test]
    fn who_waits_comes_first_and_keeps_a_thread() {
        let mut plan = FetchPlan::new(1000, CHUNK);
        plan.ahead(10..100, |_| true);
        let first = plan.start_next().unwrap();
        assert_eq!(first.chunks, 10..26);
        assert_eq!(plan.start_next().unwrap().chunks, 26..42);
        assert_eq!(plan.start_next(), None);
        plan.demand(50, (), later());
        assert_eq!(plan.start_next().unwrap().chunks, 50..51);
        plan.settle(50);
        plan.end(&first, 0..0, Failure::Final, Instant::now());
        assert_eq!(plan.start_next().unwrap().chunks, 42..50);
    }

    #[test]
    fn a_failure_is_tried_again_until_the_deadline() {
        let mut plan = FetchPlan::new(1000, CHUNK);
        let deadline = later();
        plan.demand(5, 'a', deadline);
        let run = plan.start_next().unwrap();
        let now = Instant::now();
        let (told, pause) = plan.end(&run, 5..6, Failure::Temporary, now);
        assert_eq!((told.len(), pause), (0, Some(FIRST_BACKOFF)));
        let run = plan.start_next().unwrap();
        let (told, pause) = plan.end(&run, 5..6, Failure::Temporary, deadline);
        assert_eq!((told, pause), (vec!['a'], None));
        assert_eq!(plan.start_next(), None);
        plan.demand(5, 'b', later());
        let run = plan.start_next().unwrap();
        assert_eq!(plan.end(&run, 5..6, Failure::Final, now).0, ['b']);
    }

    #[test]
    fn of_a_broken_run_only_what_somebody_waits_for_goes_on() {
        let mut plan = FetchPlan::new(1000, CHUNK);
        plan.ahead(0..8, |_| true);
        let run = plan.start_next().unwrap();
        plan.demand(6, (), later());
        plan.settle(0);
        let (told, _) = plan.end(&run, 1..8, Failure::Temporary, Instant::now());
        assert!(told.is_empty());
        assert_eq!(plan.start_next().unwrap().chunks, 6..7);
        assert_eq!(plan.start_next(), None);
    }

    #[test]
    fn a_wrong_checksum_is_tried_three_times() {
        let mut plan = FetchPlan::new(1000, CHUNK);
        plan.demand(5, (), later());
        for attempt in 1..=CORRUPT_ATTEMPTS {
            let run = plan.start_next().unwrap();
            let (told, _) = plan.end(&run, 5..6, Failure::Corrupt, Instant::now());
            assert_eq!(told.len(), usize::from(attempt == CORRUPT_ATTEMPTS));
        }
    }
}
