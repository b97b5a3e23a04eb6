//! The memory balloon (virtio 1.2, 5.5): the guest gives pages back to the host, when it is asked
//! for some (inflation), and by itself those that are free (free page reporting). It also tells how
//! it uses its memory.
//!
//! Everything is done on the notifying vCPU's thread: what a guest's balloon costs, the guest pays.

mod pages;
mod statistics;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::served_queue::{Broken, ServedQueue};
use super::{
    Activation, ActivationError, DeviceHealth, FEATURE_EVENT_IDX, FEATURE_INDIRECT,
    FEATURE_VERSION_1, VirtioDevice,
};
use crate::config::BalloonConfig;
use crate::memory::GuestMemory;

pub use statistics::BalloonStatistics;

/// `VIRTIO_BALLOON_F_STATS_VQ`, `…_DEFLATE_ON_OOM` and `…_PAGE_REPORTING` (5.5.3).
const FEATURE_STATISTICS: u64 = 1 << 1;
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
const FEATURE_REPORTING: u64 = 1 << 5;

/// Inflation, deflation, statistics, free page hints, free page reporting (5.5.2).
const QUEUE_SIZES: [u16; 5] = [128, 128, 8, 32, 32];
/// Bytes of the configuration: the pages wanted and those there are.
const CONFIG_BYTES: usize = 8;
const ACTUAL: u64 = 4;

/// What of a balloon is seen and changed from outside of its guest. It outlives the guest's reboots.
#[derive(Debug, Default)]
pub struct BalloonControl {
    /// Pages of 4 KiB that the guest is to give back.
    wanted: AtomicU32,
    /// How many it says it has given back.
    actual: AtomicU32,
    /// Counts changes of `wanted`.
    generation: AtomicU32,
    observed: Mutex<Observed>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Observed {
    statistics: Option<(BalloonStatistics, Instant)>,
    /// The running device, to be told of changes.
    health: Option<DeviceHealth>,
    /// Buffers of statistics that came so far.
    count: u64,
    reported_bytes: u64,
}

/// What is known of a balloon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Pages of 4 KiB that the guest is to give back.
    pub wanted_pages: u32,
    /// Those that it says it has given back.
    pub actual_pages: u32,
    /// Bytes of free memory that it has reported so far, the same memory as often as it did.
    pub reported_bytes: u64,
    /// What it last said of its memory, and how long ago.
    pub statistics: Option<(BalloonStatistics, Duration)>,
}

impl BalloonControl {
    /// A balloon that is to have `pages` pages of 4 KiB.
    pub fn new(pages: u32) -> Self {
        Self {
            wanted: AtomicU32::new(pages),
            ..Self::default()
        }
    }

    /// Changes how much the guest is to give back, in pages of 4 KiB.
    pub fn resize(&self, pages: u32) {
        self.wanted.store(pages, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
        if let Some(health) = &self.observed().health {
            health.config_changed();
        }
    }

    /// What is known.
    pub fn status(&self) -> BalloonStatus {
        let observed = self.observed();
        BalloonStatus {
            wanted_pages: self.wanted.load(Ordering::Acquire),
            actual_pages: self.actual.load(Ordering::Acquire),
            reported_bytes: observed.reported_bytes,
            statistics: observed
                .statistics
                .map(|(statistics, at)| (statistics, at.elapsed())),
        }
    }

    /// Waits until `ask`, which asks the guest for statistics, is answered; not for long.
    pub fn await_statistics(&self, limit: Duration, ask: impl FnOnce()) {
        let before = self.observed().count;
        ask();
        let observed = self.observed();
        let waited = self
            .arrived
            .wait_timeout_while(observed, limit, |observed| observed.count == before);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn observed(&self) -> std::sync::MutexGuard<'_, Observed> {
        self.observed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A balloon as the guest's driver sees it.
pub struct Balloon {
    control: Arc<BalloonControl>,
    features: u64,
    active: Option<Active>,
}

/// What a snapshot keeps of a balloon.
#[derive(Debug, Serialize, Deserialize)]
struct BalloonState {
    wanted: u32,
    actual: u32,
}

struct Active {
    memory: GuestMemory,
    inflate: Option<ServedQueue>,
    deflate: Option<ServedQueue>,
    statistics: Option<ServedQueue>,
    reporting: Vec<ServedQueue>,
    /// The buffer that the driver gets back when statistics are wanted.
    held: Option<u16>,
    health: DeviceHealth,
}

impl Balloon {
    /// A balloon whose size `control` says.
    pub fn new(config: &BalloonConfig, control: Arc<BalloonControl>) -> Self {
        let mut features = FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT;
        for (wanted, feature) in [
            (config.statistics, FEATURE_STATISTICS),
            (config.deflate_on_oom, FEATURE_DEFLATE_ON_OOM),
            (config.free_page_reporting, FEATURE_REPORTING),
        ] {
            features |= if wanted { feature } else { 0 };
        }
        Self {
            control,
            features,
            active: None,
        }
    }

    fn fail(&mut self, error: &Broken) {
        tracing::warn!("the guest's balloon queue is broken: {error}");
        if let Some(active) = self.active.take() {
            active.health.needs_reset();
        }
        self.control.observed().health = None;
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_BYTES];
        let (wanted, actual) = (&self.control.wanted, &self.control.actual);
        config[..4].copy_from_slice(&wanted.load(Ordering::Acquire).to_le_bytes());
        config[4..].copy_from_slice(&actual.load(Ordering::Acquire).to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(config.iter().skip(start)) {
            *byte = *value;
        }
    }

    fn config_generation(&self) -> u8 {
        (self.control.generation.load(Ordering::Acquire) & 0xff) as u8
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            let actual = u32::from_le_bytes(bytes);
            self.control.actual.store(actual, Ordering::Release);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let mut active = Active::open(activation)?;
        self.control.observed().health = Some(active.health.clone());
        // Requests may be there already, notified while the device wasn't active.
        let served = (0u16..)
            .take(QUEUE_SIZES.len())
            .try_for_each(|index| active.serve(index, &self.control));
        self.active = Some(active);
        if let Err(e) = served {
            self.fail(&e);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.control.observed().health = None;
        // The driver that comes next has given nothing back.
        self.control.actual.store(0, Ordering::Release);
    }

    fn pause(&mut self) -> Result<(), String> {
        self.active = None;
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        let state = BalloonState {
            wanted: self.control.wanted.load(Ordering::Acquire),
            actual: self.control.actual.load(Ordering::Acquire),
        };
        // Two numbers can't fail to be encoded.
        postcard::to_allocvec(&state).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), String> {
        let state: BalloonState = postcard::from_bytes(state).map_err(|e| e.to_string())?;
        self.control.wanted.store(state.wanted, Ordering::Release);
        self.control.actual.store(state.actual, Ordering::Release);
        Ok(())
    }

    fn handles_notifications(&self, _index: u16) -> bool {
        true
    }

    fn notify(&mut self, index: u16) {
        if let Some(active) = &mut self.active
            && let Err(e) = active.serve(index, &self.control)
        {
            self.fail(&e);
        }
    }

    /// Gives the guest its buffer back, which it fills and sends again.
    fn ask_for_statistics(&mut self) {
        if let Some(active) = &mut self.active
            && let Err(e) = active.return_statistics()
        {
            self.fail(&e);
        }
    }
}

impl Active {
    /// Finds out what each queue is. Those of features that the driver didn't take don't exist
    /// (5.5.2): then a driver that counts the ones that do, as Linux before 6.11, has the next at
    /// its number. Free page hints are never offered, so queues 3 and 4 are both reports.
    fn open(activation: Activation) -> Result<Self, ActivationError> {
        let memory = activation.memory;
        let event_idx = activation.features & FEATURE_EVENT_IDX != 0;
        let has_statistics = activation.features & FEATURE_STATISTICS != 0;
        let mut active = Self {
            memory: Arc::clone(&memory),
            inflate: None,
            deflate: None,
            statistics: None,
            reporting: Vec::new(),
            held: None,
            health: activation.health,
        };
        for queue in activation.queues {
            let served = ServedQueue::open(queue, &memory, event_idx)?;
            match served.index {
                0 => active.inflate = Some(served),
                1 => active.deflate = Some(served),
                2 if has_statistics => active.statistics = Some(served),
                _ if activation.features & FEATURE_REPORTING != 0 => active.reporting.push(served),
                _ => {}
            }
        }
        Ok(active)
    }

    fn serve(&mut self, index: u16, control: &BalloonControl) -> Result<(), Broken> {
        let memory = &self.memory;
        if let Some(served) = self.inflate.as_mut().filter(|served| served.index == index) {
            served.serve(|chain| {
                pages::give_back_listed(memory, chain);
                0
            })?;
        } else if let Some(served) = self.deflate.as_mut().filter(|served| served.index == index) {
            // The pages are the guest's again when it touches them.
            served.serve(|_| 0)?;
        } else if let Some(served) = self.reporting.iter_mut().find(|s| s.index == index) {
            let mut bytes = 0;
            let result = served.serve(|chain| {
                bytes += pages::give_back_buffers(memory, chain);
                0
            });
            control.observed().reported_bytes += bytes;
            result?;
        } else if self.statistics.as_ref().is_some_and(|s| s.index == index) {
            self.take_statistics(control)?;
        }
        Ok(())
    }

    /// Takes the driver's buffer with statistics and keeps it; there is one at a time.
    fn take_statistics(&mut self, control: &BalloonControl) -> Result<(), Broken> {
        let Some(served) = &mut self.statistics else {
            return Ok(());
        };
        for _ in 0..served.size() {
            let Some(chain) = served.pop()? else {
                break;
            };
            if let Some(held) = self.held.replace(chain.head_index()) {
                served.put(held, 0)?;
            }
            let statistics = BalloonStatistics::read(&self.memory, chain);
            let mut observed = control.observed();
            observed.statistics = Some((statistics, Instant::now()));
            observed.count += 1;
            control.arrived.notify_all();
        }
        served.finish()
    }

    fn return_statistics(&mut self) -> Result<(), Broken> {
        if let (Some(served), Some(held)) = (&mut self.statistics, self.held.take()) {
            served.put(held, 0)?;
            served.finish()?;
        }
        Ok(())
    }
}
