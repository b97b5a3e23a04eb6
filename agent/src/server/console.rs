//! Joins a gRPC stream and a guest's console socket.

use std::path::Path;

use futures::{Stream, StreamExt};
use keelson_api::proto::{ConsoleInput, ConsoleOutput};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::{Status, Streaming};

/// How much of the console's output is sent at once.
const CHUNK: usize = 16 << 10;

/// Connects to the console at `socket` and passes bytes both ways until either side ends.
///
/// # Errors
/// `FAILED_PRECONDITION` where the guest does not run.
pub async fn attach(
    socket: &Path,
    first: &ConsoleInput,
    mut input: Streaming<ConsoleInput>,
) -> Result<impl Stream<Item = Result<ConsoleOutput, Status>> + Send + use<>, Status> {
    let stream = UnixStream::connect(socket).await.map_err(|error| {
        Status::failed_precondition(format!(
            "VirtualMachine/{} has no console ({error}); does it run?",
            first.name
        ))
    })?;
    let (reader, mut writer) = stream.into_split();
    let first = first.data.clone();
    let writing = tokio::spawn(async move {
        writer.write_all(&first).await?;
        while let Some(Ok(message)) = input.next().await {
            writer.write_all(&message.data).await?;
        }
        // A client that sends no more may still want to read.
        std::future::pending::<std::io::Result<()>>().await
    });
    // Dropped with the stream, which ends the task, and with it the socket's other half.
    let writing = AbortOnDrop(writing);
    Ok(futures::stream::try_unfold(
        (reader, writing),
        |(mut reader, writing)| async move {
            let mut data = vec![0; CHUNK];
            let length = reader
                .read(&mut data)
                .await
                .map_err(|error| Status::unavailable(error.to_string()))?;
            data.truncate(length);
            Ok((length > 0).then_some((ConsoleOutput { data }, (reader, writing))))
        },
    ))
}

struct AbortOnDrop(tokio::task::JoinHandle<std::io::Result<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
