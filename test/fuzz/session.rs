//! Fuzzes a client's frames into a session whose daemon is cat: a byte that says how many of the next come with the
//! request head, and what the client sends.
#![no_main]

include!(concat!(env!("OUT_DIR"), "/main.rs"));

mod target {
    use super::config::{self, Config};
    use super::poll::Event;
    use super::session::{self, Daemon, Opening};
    use libfuzzer_sys::fuzz_target;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::sync::{Arc, LazyLock};
    use std::{fs, thread, time::Duration};

    struct Stage {
        config: Config,
        listener: TcpListener,
        closing: Event,
    }

    static STAGE: LazyLock<Stage> = LazyLock::new(|| {
        let file = std::env::temp_dir().join(format!("nix-relay-fuzz-{}", std::process::id()));
        fs::write(
            &file,
            "[auth]\nallowed_org = \"x\"\n[daemon]\nnix_daemon_path = \"cat\"",
        )
        .unwrap();
        let config = config::load(file.to_str()).unwrap();
        fs::remove_file(file).unwrap();
        Stage {
            config,
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            closing: Event::new().unwrap(),
        }
    });

    /// How many of the client's bytes are good frames that go on with the session, and the data in them (RFC 6455,
    /// section 5): text, a Close, and whatever is not a frame end it.
    fn understood(bytes: &[u8]) -> (usize, Vec<u8>) {
        let (mut length, mut data, mut message) = (0, Vec::new(), None::<Vec<u8>>);
        while let Some((first, masked, mask, payload, rest)) = frame(&bytes[length..]) {
            let (last, size) = (first & 0x80 != 0, payload.len());
            let payload = payload
                .iter()
                .zip(mask.iter().cycle())
                .map(|(byte, mask)| byte ^ mask);
            match first & 0x7F {
                _ if !masked => break,
                0 if message.is_some() => message.as_mut().unwrap().extend(payload),
                2 if message.is_none() => message = Some(payload.collect()),
                9 | 10 if last && size <= 125 => {
                    length = bytes.len() - rest.len();
                    continue;
                }
                _ => break,
            }
            if last {
                data.extend(message.take().unwrap());
            }
            length = bytes.len() - rest.len();
        }
        (length, data)
    }

    /// The first byte of a frame, whether there is a mask, the mask, the payload, and what follows.
    #[allow(clippy::type_complexity)]
    fn frame(bytes: &[u8]) -> Option<(u8, bool, [u8; 4], &[u8], &[u8])> {
        let (&[first, second], mut rest) = bytes.split_first_chunk()?;
        let mut length = u64::from(second & 0x7F);
        if length == 126 {
            let (bytes, after) = rest.split_first_chunk()?;
            (length, rest) = (u16::from_be_bytes(*bytes).into(), after);
        } else if length == 127 {
            let (bytes, after) = rest.split_first_chunk()?;
            (length, rest) = (u64::from_be_bytes(*bytes), after);
        }
        let mut mask = [0; 4];
        if second & 0x80 != 0 {
            (mask, rest) = rest
                .split_first_chunk()
                .map(|(mask, after)| (*mask, after))?;
        }
        let (payload, rest) = rest.split_at_checked(length.try_into().ok()?)?;
        Some((first, second & 0x80 != 0, mask, payload, rest))
    }

    /// The client: all that it is sent comes back before the session ends, in frames that are as they should be.
    fn client(mut socket: TcpStream, bytes: &[u8], understood: usize, data: &[u8]) {
        let mut answer = Vec::new();
        socket.write_all(&bytes[..understood]).unwrap();
        while echo(&answer).len() < data.len() {
            let mut chunk = [0; 4096];
            let length = socket.read(&mut chunk).unwrap();
            assert!(length > 0, "no more after {:?}", answer.escape_ascii());
            answer.extend(&chunk[..length]);
        }
        // It may hang up in the middle of this.
        let _ = socket
            .write_all(&bytes[understood..])
            .and(socket.shutdown(Shutdown::Write));
        let _ = socket.read_to_end(&mut answer);
        assert_eq!(
            echo(&answer).escape_ascii().to_string(),
            data.escape_ascii().to_string()
        );
    }

    /// The data in the relay's frames, the last of which may not be whole.
    fn echo(mut answer: &[u8]) -> Vec<u8> {
        let (mut data, mut closed) = (Vec::new(), false);
        while let Some((first, masked, _, payload, rest)) = frame(answer) {
            assert!(!masked && !closed, "{:?}", answer.escape_ascii());
            match first {
                0x82 if !payload.is_empty() => data.extend(payload),
                0x88..=0x8A if payload.len() <= 125 => closed = first == 0x88,
                _ => panic!("{:?}", answer.escape_ascii()),
            }
            answer = rest;
        }
        data
    }

    /// How many descriptors and children there are; libFuzzer has some of its own.
    fn held() -> (usize, usize) {
        let children = |task: fs::DirEntry| {
            fs::read_to_string(task.path().join("children")).unwrap_or_default()
        };
        let tasks = fs::read_dir("/proc/self/task")
            .unwrap()
            .flatten()
            .map(children);
        let children = tasks
            .map(|children| children.split_whitespace().count())
            .sum();
        (fs::read_dir("/proc/self/fd").unwrap().count(), children)
    }

    fuzz_target!(|bytes: &[u8]| {
        let Some((&with_head, bytes)) = bytes.split_first() else {
            return;
        };
        let Stage {
            config,
            listener,
            closing,
        } = &*STAGE;
        let before = held();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let served = Arc::new(listener.accept().unwrap().0);
        let (understood, data) = understood(bytes);
        let with_head = usize::from(with_head).min(understood);
        let rest = bytes[..with_head].to_vec();
        let daemon = Daemon::spawn(config, &[]).unwrap_or_else(|e| panic!("{}", e.cause));
        let (client_is, upgrade) = (String::new(), Vec::new());
        let opening = Opening {
            number: 1,
            client: client_is,
            upgrade,
            compressed: false,
            rest,
        };
        thread::scope(|scope| {
            scope.spawn(|| client(socket, &bytes[with_head..], understood - with_head, &data));
            session::run(config, opening, &served, daemon, closing).unwrap();
            // The client waits for the end of the connection.
            drop(served);
        });
        assert_eq!(held(), before);
    });
}
