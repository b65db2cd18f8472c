//! link NAME MBIT MS: makes the network devices NAMEa and NAMEb, and joins them by a link of so many Mbit/s on which a
//! packet is under way for so many milliseconds. A packet that would have to wait for longer than the way there and back is
//! dropped. TCP leaves it to the devices to cut packets, as to a network card; so few pass, and this needs little CPU.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use std::{env, io, process, thread};
use tun_rs::{DeviceBuilder, SyncDevice};

/// A packet, and when it arrives.
type Packet = (Instant, Vec<u8>);

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [name, mbit, ms] = &arguments[..] else {
        panic!("link NAME MBIT MS");
    };
    let secs_per_byte = 8e-6 / mbit.parse::<f64>().unwrap();
    let delay = Duration::from_millis(ms.parse().unwrap());
    let [a, b] = &["a", "b"].map(|end| {
        let device = DeviceBuilder::new().name(format!("{name}{end}")).mtu(1500);
        device
            .offload(true)
            .build_sync()
            .expect("no TUN device; is this root, and is there /dev/net/tun?")
    });
    println!("ready");

    thread::scope(|scope| {
        for (from, to) in [(a, b), (b, a)] {
            let (sender, receiver) = channel();
            scope.spawn(move || take(from, &sender, secs_per_byte, delay));
            scope.spawn(move || give(to, &receiver));
        }
        // Until whoever started us is gone.
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        process::exit(0);
    });
}

fn take(device: &SyncDevice, packets: &Sender<Packet>, secs_per_byte: f64, delay: Duration) {
    let mut buffer = vec![0; 1 << 17];
    let mut free = Instant::now();
    loop {
        // The namespace of a device may go before we do.
        let Ok(length) = device.recv(&mut buffer) else {
            return;
        };
        let now = Instant::now();
        let start = free.max(now);
        if start - now <= 2 * delay {
            free = start + Duration::from_secs_f64(length as f64 * secs_per_byte);
            packets
                .send((free + delay, buffer[..length].into()))
                .unwrap();
        }
    }
}

fn give(device: &SyncDevice, packets: &Receiver<Packet>) {
    for (due, packet) in packets {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        // Of a device that is down, nobody expects it.
        let _ = device.send(&packet);
    }
}
