//! Fuzzes a configuration file.
#![no_main]

include!(concat!(env!("OUT_DIR"), "/main.rs"));

mod target {
    use super::config;
    use libfuzzer_sys::fuzz_target;
    use std::path::PathBuf;
    use std::sync::LazyLock;

    static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
        std::env::temp_dir().join(format!("nix-relay-fuzz-{}", std::process::id()))
    });

    /// What the configuration is when the file holds this.
    fn load(text: impl AsRef<[u8]>) -> Result<String, String> {
        std::fs::write(&*FILE, text).unwrap();
        config::load(FILE.to_str()).map(|config| config.effective)
    }

    fuzz_target!(|text: &[u8]| {
        match load(text) {
            Ok(effective) => {
                let table: toml::Table = effective.parse().unwrap();
                // What the file says is in effect, and nothing but defaults besides.
                let said: toml::Table = std::str::from_utf8(text).unwrap().parse().unwrap();
                for (name, keys) in said {
                    for (key, value) in keys.as_table().unwrap() {
                        assert_eq!(format!("{:?}", table[&name][key]), format!("{value:?}"));
                    }
                }
                assert_eq!(load(&effective), Ok(effective));
            }
            Err(why) => {
                // It says at which line, and there is such a line.
                let lines = text.iter().filter(|&&byte| byte == b'\n').count() + 1;
                let place = why.split_once("TOML parse error at line ");
                let line =
                    place.and_then(|(_, rest)| rest.split_once(',')?.0.parse::<usize>().ok());
                match line {
                    Some(line) => assert!((1..=lines).contains(&line), "{why}"),
                    None => assert!(
                        why.starts_with("nobody could connect")
                            || std::str::from_utf8(text).is_err(),
                        "{why}"
                    ),
                }
            }
        }
    });
}
