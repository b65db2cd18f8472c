//! A relay as one would write it with tokio-tungstenite: `peer PROGRAM [ARGUMENT…]` runs the program for each
//! WebSocket, and checks nothing. It prints its address.

use futures_util::{SinkExt, StreamExt};
use std::env;
use std::error::Error;
use std::process::Stdio;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio_tungstenite::accept_async_with_config;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Bytes, Message};

const CHUNK_BYTES: usize = 64 << 10;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    loop {
        let (socket, _) = listener.accept().await?;
        tokio::spawn(relay(socket));
    }
}

async fn relay(socket: TcpStream) -> Result<(), Box<dyn Error + Send + Sync>> {
    socket.set_nodelay(true)?;
    let config = WebSocketConfig::default().read_buffer_size(CHUNK_BYTES);
    let websocket = accept_async_with_config(socket, Some(config)).await?;
    let (mut sender, mut receiver) = websocket.split();

    let mut child = spawn()?;
    let mut stdin = child.stdin.take().ok_or("no pipe")?;
    let mut stdout = child.stdout.take().ok_or("no pipe")?;

    let inward = async {
        while let Some(message) = receiver.next().await {
            if let Message::Binary(payload) = message? {
                stdin.write_all(&payload).await?;
            }
        }
        Ok(())
    };
    let outward = async {
        loop {
            let mut chunk = Vec::with_capacity(CHUNK_BYTES);
            if stdout.read_buf(&mut chunk).await? == 0 {
                return Ok(sender.close().await?);
            }
            sender.send(Message::Binary(Bytes::from(chunk))).await?;
        }
    };
    tokio::select! {
        ended = inward => ended,
        ended = outward => ended,
    }
}

fn spawn() -> std::io::Result<Child> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    Command::new(&arguments[0])
        .args(&arguments[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
}
