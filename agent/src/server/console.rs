//! Joins a gRPC stream and a guest's console socket.

use futures::{Stream, StreamExt};
use keelson_api::proto::{ConsoleInput, ConsoleOutput, TerminalSize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tonic::{Status, Streaming};

use crate::guest::{GuestPaths, Machine};

/// How much of the console's output is sent at once.
const CHUNK: usize = 16 << 10;

/// Connects to the console of the guest at `paths` and passes bytes both ways until either side ends.
///
/// # Errors
/// `FAILED_PRECONDITION` where the guest does not run.
pub async fn attach(
    paths: &GuestPaths,
    first: ConsoleInput,
    mut input: Streaming<ConsoleInput>,
) -> Result<impl Stream<Item = Result<ConsoleOutput, Status>> + Send + use<>, Status> {
    let stream = UnixStream::connect(paths.console_socket()).await;
    let stream = stream.map_err(|error| {
        Status::failed_precondition(format!(
            "VirtualMachine/{} has no console ({error}); does it run?",
            first.name
        ))
    })?;
    let (reader, mut writer) = stream.into_split();
    let paths = paths.clone();
    let writing = tokio::spawn(async move {
        pass(&paths, first, &mut writer).await?;
        while let Some(Ok(message)) = input.next().await {
            pass(&paths, message, &mut writer).await?;
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

/// Passes on what a client typed, and its terminal's size.
async fn pass(
    paths: &GuestPaths,
    message: ConsoleInput,
    writer: &mut OwnedWriteHalf,
) -> std::io::Result<()> {
    if let Some(size) = message.size {
        resize(paths, size).await;
    }
    writer.write_all(&message.data).await
}

async fn resize(paths: &GuestPaths, TerminalSize { columns, rows }: TerminalSize) {
    let size = (u16::try_from(columns), u16::try_from(rows));
    let ((Ok(columns), Ok(rows)), Ok(Some(Ok(machine)))) = (size, Machine::find(paths)) else {
        return;
    };
    if let Err(error) = machine.resize_console(columns, rows).await {
        // As a serial port does, which has no size.
        tracing::debug!(%error, "the guest is not told its console's size");
    }
}

struct AbortOnDrop(tokio::task::JoinHandle<std::io::Result<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
