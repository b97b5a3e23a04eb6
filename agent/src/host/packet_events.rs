//! What happens to packets, read from the eBPF programs for as long as someone listens.

use std::sync::Arc;
use std::time::Duration;

use keelson_ebpf::{EventReader, Observed, PacketEvent};
use tokio::sync::{Notify, broadcast};

use super::network::SharedDatapath;

/// How often the ring buffer is read while someone listens.
const INTERVAL: Duration = Duration::from_millis(100);
/// Events read at once; more than the ring buffer holds.
const BATCH: usize = 32_768;
/// Events that a slow listener may be behind before it misses some.
const BACKLOG: usize = 16_384;

/// What happens to packets.
#[derive(Clone, Debug)]
pub struct PacketEvents {
    sender: broadcast::Sender<Arc<PacketEvent>>,
    wake: Arc<Notify>,
}

impl PacketEvents {
    /// Starts the task that reads, which at first asks for nothing.
    pub fn start(reader: EventReader, datapath: SharedDatapath) -> Self {
        let events = Self {
            sender: broadcast::Sender::new(BACKLOG),
            wake: Arc::default(),
        };
        tokio::spawn(events.clone().run(reader, datapath));
        events
    }

    /// Everything from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<PacketEvent>> {
        let receiver = self.sender.subscribe();
        self.wake.notify_one();
        receiver
    }

    async fn run(self, mut reader: EventReader, datapath: SharedDatapath) {
        let observe = async |observed: Observed| {
            let result = datapath.with(move |datapath| datapath.observe(observed));
            if let Err(error) = result.await {
                tracing::warn!(%error, "the events of packets can't be chosen");
            }
        };
        loop {
            observe(Observed::default()).await;
            self.wake.notified().await;
            observe(Observed {
                drops: true,
                flows: true,
            })
            .await;
            while self.sender.receiver_count() > 0 {
                for event in reader.read(BATCH) {
                    // Without a listener it is lost, as it should be.
                    let _ = self.sender.send(Arc::new(event));
                }
                tokio::time::sleep(INTERVAL).await;
            }
        }
    }
}
