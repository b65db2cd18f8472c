//! nix-relay carries the Nix worker protocol from a WebSocket to a fresh `nix-daemon --stdio`, for whoever brings an
//! OIDC token that the configuration lets in. The modules stand in the order in which a connection meets them:
//!
//! ```text
//!  accept ─► http ─► oidc ─► policy ─► permit ─► session ─────────────► end
//!            head    who is  may       may they  nix-daemon spawned,    child reaped, permit
//!            in      it?     they?     now?      101, bytes both ways   back, one log line
//!            └── an answer of one line where a step says no ──┘
//! ```
//!
//! A thread for each connection waits in one poll(2) for both sides of its session at once.
#![forbid(unsafe_code)]

/// What the operator said: TOML, environment and defaults become one validated `Config`. Reads the configuration file
/// and the environment, nothing else. Promises that whatever is in a `Config` can be used as it is, and that an error
/// is one line that names where it comes from.
mod config {
    use super::oidc::{Claims, is_safe};
    use std::{env, fs, num::NonZeroU32, ops::Range, path::Path};
    use {
        toml::Table, toml::Value, toml::de::DeTable, toml::de::DeValue,
        tungstenite::http::uri::Authority,
    };

    /// Every key but `auth.rule`, in its table, with its default.
    const DEFAULTS: &str = include_str!("config.example.toml");

    /// The effective configuration; README.md says what each key means.
    #[derive(serde::Deserialize)]
    pub struct Config {
        pub listen: String,
        pub admin_listen: String,
        pub shutdown_grace_secs: u32,
        pub handshake_timeout_secs: NonZeroU32,
        pub keepalive_secs: u32,
        pub issuer: String,
        pub audience: String,
        pub allowed_org: String,
        pub jwks_cache_ttl_secs: NonZeroU32,
        /// As they are tried. Once loaded, `allowed_org` is the last of them.
        #[serde(default)]
        pub rule: Vec<Rule>,
        pub nix_daemon_path: String,
        pub extra_args: Vec<String>,
        pub timeout_secs: NonZeroU32,
        pub max_connections: NonZeroU32,
        pub queue_timeout_secs: u32,
    }

    /// Whom to let in. Once loaded, what it leaves out is as it is outside of rules.
    #[derive(Default, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Rule {
        pub name: String,
        pub issuer: Option<String>,
        pub audience: Option<String>,
        /// A pattern, or a list of them, for each of these claims.
        pub bound_claims: Claims,
        pub extra_args: Option<Vec<String>>,
        #[serde(skip)]
        pub ignores_case: bool,
    }

    /// Defaults, then the file at `path` if there is one, then the environment: `NIX_RELAY_` and the key in capitals
    /// (with `NIX_` once only), where that is not empty. Also as TOML.
    /// Fails with one line: `FILE:LINE: KEY: what is wrong`, or `VARIABLE: what is wrong`.
    pub fn load(path: Option<&Path>) -> Result<(Config, String), String> {
        let defaults: Table = DEFAULTS.parse().map_err(|e| format!("defaults: {e}"))?;
        let mut settings = defaults.clone();
        if let Some(path) = path {
            read(path, &mut settings)?;
        }
        for (table, keys) in &defaults {
            for (key, default) in keys.as_table().into_iter().flatten() {
                let name = format!(
                    "NIX_RELAY_{}",
                    key.trim_start_matches("nix_").to_uppercase()
                );
                let text = env::var_os(&name).unwrap_or_default().into_string();
                let text = text.map_err(|_| format!("{name}: must be UTF-8"))?;
                let value = match default {
                    _ if text.is_empty() => continue,
                    Value::Integer(_) => text.parse().map_or(text.into(), Value::Integer),
                    Value::Array(_) => text.split_whitespace().collect::<Vec<_>>().into(),
                    _ => text.into(),
                };
                set(&mut settings, table, key, value).map_err(|e| format!("{name}: {e}"))?;
            }
        }
        let mut config = typed(&settings)?;
        let Config {
            rule: rules,
            issuer,
            audience,
            allowed_org,
            extra_args,
            ..
        } = &mut config;
        if !allowed_org.is_empty() {
            let bound_claims =
                Claims::from_iter([("repository_owner".into(), allowed_org.clone().into())]);
            rules.push(Rule {
                name: "allowed_org".into(),
                bound_claims,
                ignores_case: true,
                ..Rule::default()
            });
        } else if rules.is_empty() {
            let set = "set auth.allowed_org (NIX_RELAY_ALLOWED_ORG) to the organisation whose jobs may, or add a rule";
            return Err(format!("nobody could connect: {set}"));
        }
        for rule in rules {
            rule.issuer.get_or_insert_with(|| issuer.clone());
            rule.audience.get_or_insert_with(|| audience.clone());
            rule.extra_args.get_or_insert_with(|| extra_args.clone());
        }
        Ok((config, settings.to_string()))
    }

    fn read(path: &Path, settings: &mut Table) -> Result<(), String> {
        let file = path.display();
        let text = fs::read_to_string(path).map_err(|e| format!("{file}: {e}"))?;
        let at =
            |span: Range<usize>| format!("{file}:{}", text[..span.start].matches('\n').count() + 1);
        let invalid =
            |e: toml::de::Error| format!("{}: {}", at(e.span().unwrap_or_default()), e.message());
        let values: Table = text.parse().map_err(invalid)?;
        for (table, keys) in DeTable::parse(&text).map_err(invalid)?.get_ref() {
            let name = table.get_ref().as_ref();
            let Some(keys) = keys
                .get_ref()
                .as_table()
                .filter(|_| settings.contains_key(name))
            else {
                return Err(format!(
                    "{}: {name}: unknown table or key",
                    at(table.span())
                ));
            };
            for (key, value) in keys {
                let (span, key) = (key.span(), key.get_ref().as_ref());
                let (new, mut steps) = (&values[name][key], Vec::new());
                // Rules, too, come one at a time.
                if let (DeValue::Array(spans), Value::Array(rules), "rule") =
                    (value.get_ref(), new, key)
                {
                    steps.extend(
                        spans
                            .iter()
                            .enumerate()
                            .map(|(n, rule)| (rule.span(), rules[..=n].to_vec().into())),
                    );
                }
                steps.push((span, new.clone()));
                for (span, value) in steps {
                    set(settings, name, key, value)
                        .map_err(|e| format!("{}: {name}.{key}: {e}", at(span)))?;
                }
            }
        }
        Ok(())
    }

    /// One setting at a time, so that whatever is wrong afterwards is wrong with this one.
    fn set(settings: &mut Table, table: &str, key: &str, value: Value) -> Result<(), String> {
        let keys = settings
            .get_mut(table)
            .and_then(Value::as_table_mut)
            .ok_or("unknown table")?;
        if keys.insert(key.into(), value.clone()).is_none() && key != "rule" {
            return Err("unknown key".into());
        }
        typed(settings)?;
        check(key, &value)
    }

    /// What a type cannot say.
    fn check(key: &str, value: &Value) -> Result<(), String> {
        let text = value.as_str().unwrap_or_default();
        let is_address = |a: Authority| a.port_u16().is_some() && !a.host().is_empty();
        let is_pattern = |value: &Value| value.is_str() || value.is_integer() || value.is_bool();
        let is_list = |all: &Vec<Value>| !all.is_empty() && all.iter().all(is_pattern);
        let is_bound = |to: &Value| to.as_array().map_or(is_pattern(to), is_list);
        let (good, must) = match (key, value) {
            ("rule", Value::Array(rules)) => {
                let mut keys = rules.iter().filter_map(Value::as_table).flatten();
                return keys.try_for_each(|(key, value)| {
                    check(key, value).map_err(|e| format!("{key}: {e}"))
                });
            }
            ("bound_claims", Value::Table(claims)) => (
                !claims.is_empty() && claims.values().all(is_bound),
                "have at least one claim, and for each a text, a number, a boolean, or a list of these",
            ),
            ("admin_listen", _) if text.is_empty() => return Ok(()),
            ("listen" | "admin_listen", _) => (
                text.parse().is_ok_and(is_address),
                "be HOST:PORT or [IPV6]:PORT",
            ),
            ("issuer", _) => (is_safe(text), "be an https URL (http for loopback alone)"),
            // The daemon runs in /, so a path relative to where the relay started would mislead.
            ("nix_daemon_path", _) if text.contains('/') => {
                (text.starts_with('/'), "be absolute, or a name in PATH")
            }
            ("name" | "audience" | "nix_daemon_path", _) => (!text.is_empty(), "not be empty"),
            ("allowed_org", _) => (
                !text.contains('*'),
                "be one name; patterns are for auth.rule",
            ),
            _ => return Ok(()),
        };
        if good {
            Ok(())
        } else {
            Err(format!("must {must}, not {value}"))
        }
    }

    /// The keys of all tables, whose names differ.
    fn typed(settings: &Table) -> Result<Config, String> {
        let keys = settings.values().filter_map(Value::as_table).flatten();
        let all: Table = keys
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        all.try_into().map_err(|e| e.to_string())
    }
}

/// Who is calling: a token and the keys that its issuer publishes become verified claims. Talks to the issuers (OpenID
/// Connect Discovery 1.0, RFC 7517), and reads the certificates to trust. Promises that a `Claims` exists only after
/// signature, issuer, audience and times of its token were checked (RFC 7519, RFC 8725), that a token is compared with
/// the keys of the issuer that it names alone, and that it goes nowhere from here, the log included.
mod oidc {
    use super::{
        admin, config::Config, http::Answer, http::INVALID_TOKEN, http::RETRY, lock, secs,
    };
    use serde::de::{Deserializer, Error, MapAccess, Visitor};
    use std::{collections::BTreeMap, collections::HashSet, env, fmt, fs, io, net::IpAddr, thread};
    use std::{sync::Arc, sync::Mutex, time::Duration, time::Instant};
    use ureq::{Agent, http::Uri, tls::PemItem, tls::TlsConfig, tls::parse_pem};
    use {
        jwt_simple::JWTError, jwt_simple::prelude::*, log::info, log::warn, serde_json::Map,
        serde_json::Value,
    };

    /// How far the issuer's clock and ours may be apart, in seconds.
    const CLOCK_SKEW: u64 = 60;
    const MAX_DOCUMENT_BYTES: u64 = 1 << 20;
    const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
    /// For the discovery document and the key set together.
    const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
    /// Keys that could not be fetched again for so long are believed no more.
    const MAX_KEY_AGE: Duration = Duration::from_secs(24 * 3600);
    /// Between fetches for tokens that name an unknown key, and after one that failed; and while there are no keys.
    const PAUSE: Duration = Duration::from_secs(30);
    const SHORT_PAUSE: Duration = Duration::from_secs(1);

    /// Issuers are reached by https, or by http on this machine alone.
    pub fn is_safe(url: &str) -> bool {
        let uri: Uri = url.parse().unwrap_or_default();
        match (uri.scheme_str(), uri.host().unwrap_or_default()) {
            (Some("https"), host) => !host.is_empty(),
            (Some("http"), "localhost") => true,
            (Some("http"), host) => host
                .trim_matches(['[', ']'])
                .parse()
                .is_ok_and(|ip: IpAddr| ip.is_loopback()),
            _ => false,
        }
    }

    /// The claims of a token that was verified.
    pub type Claims = Map<String, Value>;
    type Verify = dyn Fn(&str, &VerificationOptions) -> Result<(), jwt_simple::Error> + Send + Sync;

    /// A published key, bound to one algorithm: the key decides on that, never the token.
    struct Key {
        id: Option<String>,
        verify: Box<Verify>,
    }

    /// One for each algorithm that a JSON Web Key is good for: none if its kind is unknown, it is too weak or not for
    /// signatures; several if it is of RSA and does not say.
    fn parse(jwk: &Value) -> Vec<Key> {
        let (text, id, mut keys) = (jwk.to_string(), jwk["kid"].as_str(), Vec::new());
        macro_rules! try_each {
            ($($kind:ty),*) => {$(
                if let Ok(key) = <$kind>::from_jwk(&text) {
                    let verify = move |token: &str, options: &VerificationOptions| {
                        key.verify_token::<NoCustomClaims>(token, Some(options.clone())).map(drop)
                    };
                    keys.push(Key { id: id.map(String::from), verify: Box::new(verify) });
                }
            )*};
        }
        try_each!(
            RS256PublicKey,
            RS384PublicKey,
            RS512PublicKey,
            PS256PublicKey,
            PS384PublicKey,
            PS512PublicKey
        );
        try_each!(ES256PublicKey, ES384PublicKey, Ed25519PublicKey);
        keys
    }

    pub struct Issuer {
        url: String,
        audiences: HashSet<String>,
        agent: Agent,
        /// What it has published, and when we asked for that.
        keys: Mutex<Option<(Instant, Arc<Vec<Key>>)>>,
        /// When keys were last fetched for a token, or could not be. Held during each fetch.
        fetching: Mutex<Option<Instant>>,
    }

    /// The issuers of all rules, each with a thread that fetches its keys; waits for none. Fails without threads, and
    /// without certificates if SSL_CERT_FILE says where to find those to trust.
    pub fn start(config: &Config) -> io::Result<Vec<Arc<Issuer>>> {
        let mut agent = Agent::config_builder()
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .max_idle_connections(0);
        agent = agent
            .max_redirects(0)
            .user_agent(concat!("nix-relay/", env!("CARGO_PKG_VERSION")));
        if let Some(path) = env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()) {
            let unusable =
                |e: &str| io::Error::other(format!("SSL_CERT_FILE={}: {e}", path.display()));
            let pem = fs::read(&path).map_err(|e| unusable(&e.to_string()))?;
            let certificate = |item| {
                if let Ok(PemItem::Certificate(of)) = item {
                    Some(of)
                } else {
                    None
                }
            };
            let roots: Vec<_> = parse_pem(&pem).filter_map(certificate).collect();
            if roots.is_empty() {
                return Err(unusable("there is no certificate in it"));
            }
            agent = agent.tls_config(TlsConfig::builder().root_certs(roots.into()).build());
        }
        let (agent, cache_ttl) = (agent.build().new_agent(), secs(config.jwks_cache_ttl_secs));
        let mut all = BTreeMap::<_, HashSet<_>>::new();
        for rule in &config.rule {
            all.entry(rule.issuer.clone().unwrap_or_default())
                .or_default()
                .extend(rule.audience.clone());
        }
        let start = |(url, audiences)| {
            let (agent, keys, fetching) = (agent.clone(), Mutex::default(), Mutex::default());
            let issuer = Arc::new(Issuer {
                url,
                audiences,
                agent,
                keys,
                fetching,
            });
            let kept = issuer.clone();
            let keep = move || loop {
                let mut last = lock(&kept.fetching);
                // A token may have been faster.
                let age = lock(&kept.keys)
                    .as_ref()
                    .map_or(cache_ttl, |(at, _)| at.elapsed());
                let pause = match cache_ttl.saturating_sub(age) {
                    Duration::ZERO if kept.fetch(&mut last) => cache_ttl,
                    Duration::ZERO => cache_ttl.min(PAUSE),
                    left => left,
                };
                drop(last);
                thread::sleep(pause);
            };
            thread::Builder::new()
                .name("keys".into())
                .spawn(keep)
                .map(|_| issuer)
        };
        all.into_iter().map(start).collect()
    }

    impl Issuer {
        /// Says whether it worked; if not, the keys that we have stay, and whoever waited for it is not to try again.
        fn fetch(&self, last: &mut Option<Instant>) -> bool {
            let now = Instant::now();
            let failed =
                |e: &String| warn!("could not fetch keys issuer={:?} error={e:?}", self.url);
            let keys = self.published(now + FETCH_TIMEOUT).inspect_err(failed);
            let result = if keys.is_ok() { "ok" } else { "error" };
            admin::add(&format!("jwks_refreshes_total{{result={result:?}}}"), 1.0);
            let Ok(keys) = keys else {
                *last = Some(Instant::now());
                return false;
            };
            info!("fetched keys issuer={:?} count={}", self.url, keys.len());
            *lock(&self.keys) = Some((now, Arc::new(keys)));
            true
        }

        /// Discovery document, then key set (OpenID Connect Discovery 1.0, sections 4.1 to 4.3).
        fn published(&self, deadline: Instant) -> Result<Vec<Key>, String> {
            let url = self.url.trim_end_matches('/');
            let document =
                self.get(&format!("{url}/.well-known/openid-configuration"), deadline)?;
            if document["issuer"] != self.url {
                return Err(format!(
                    "discovery names another issuer, {}",
                    document["issuer"]
                ));
            }
            let url = document["jwks_uri"].as_str().unwrap_or_default();
            if !is_safe(url) {
                return Err(format!("the jwks_uri must be an https URL, not {url:?}"));
            }
            let set = self.get(url, deadline)?;
            let keys: Vec<Key> = set["keys"]
                .as_array()
                .into_iter()
                .flatten()
                .flat_map(parse)
                .collect();
            if keys.is_empty() {
                Err(format!("{url}: no key of use"))
            } else {
                Ok(keys)
            }
        }

        fn get(&self, url: &str, deadline: Instant) -> Result<Value, String> {
            let left = deadline.saturating_duration_since(Instant::now());
            let request = self
                .agent
                .get(url)
                .config()
                .timeout_global(Some(left))
                .build();
            let body = request
                .call()
                .and_then(|mut answer| match answer.status().as_u16() {
                    200 => answer
                        .body_mut()
                        .with_config()
                        .limit(MAX_DOCUMENT_BYTES)
                        .read_json(),
                    status => Err(ureq::Error::StatusCode(status)),
                });
            body.map_err(|e| format!("{url}: {e}"))
        }

        /// The keys, if they are not too old to be believed. If none of them is the one, they are fetched again, unless
        /// that was done a moment ago. Waits only then: for a fetch that is going on, and for its own.
        fn keys(&self, is_the_one: impl Fn(&Key) -> bool) -> Option<Arc<Vec<Key>>> {
            let cached = || {
                lock(&self.keys)
                    .clone()
                    .filter(|(at, _)| at.elapsed() < MAX_KEY_AGE)
                    .map(|(_, keys)| keys)
            };
            let found = || cached().filter(|keys| keys.iter().any(&is_the_one));
            found().or_else(|| {
                let mut fetching = lock(&self.fetching);
                let pause = if cached().is_some() {
                    PAUSE
                } else {
                    SHORT_PAUSE
                };
                if found().is_none() && fetching.is_none_or(|at| at.elapsed() >= pause) {
                    self.fetch(&mut fetching);
                    *fetching = Some(Instant::now());
                }
                cached()
            })
        }
    }

    /// The members of a JSON object, which may be anybody's. A name that is there twice is refused: others might read
    /// the first where we read the last (RFC 7519, section 4).
    struct Members;

    impl<'de> Visitor<'de> for Members {
        type Value = Claims;

        fn expecting(&self, to: &mut fmt::Formatter) -> fmt::Result {
            to.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Claims, A::Error> {
            let mut all = Claims::new();
            while let Some((name, value)) = members.next_entry()? {
                if all.insert(name, value).is_some() {
                    return Err(A::Error::custom("a name is there twice"));
                }
            }
            Ok(all)
        }
    }

    /// The object that a part of a token holds.
    fn object(part: &str) -> Option<Claims> {
        let json = Base64UrlSafeNoPadding::decode_to_vec(part, None).ok()?;
        let mut reader = serde_json::Deserializer::from_slice(&json);
        let object = reader.deserialize_map(Members).ok()?;
        reader.end().is_ok().then_some(object)
    }

    /// Answers 401 if the token does not verify, and 503 if there are no keys to tell.
    pub fn verify(issuers: &[Arc<Issuer>], token: &str) -> Result<Claims, Answer> {
        let invalid = |why: &str| {
            Answer::new(
                401,
                INVALID_TOKEN,
                &format!("the token does not verify: {why}"),
            )
        };
        let mut parts = token.split('.').map_while(object);
        let (Some(header), Some(claims)) = (parts.next(), parts.next()) else {
            return Err(invalid("it is not a signed JSON Web Token"));
        };
        if header.contains_key("crit") {
            return Err(invalid(
                "it has a critical extension, and this relay knows none",
            ));
        }
        let issuer = issuers
            .iter()
            .find(|issuer| claims.get("iss").is_some_and(|named| *named == issuer.url));
        let issuer =
            issuer.ok_or_else(|| invalid("its issuer is not one that this relay trusts"))?;
        // A token that names no key may be signed by any.
        let id = header.get("kid").and_then(Value::as_str);
        let is_named = |key: &Key| id.is_none() || key.id.as_deref() == id;
        let unavailable = || Answer::new(503, RETRY, "the issuer's keys cannot be had now");
        let keys = issuer.keys(is_named).ok_or_else(unavailable)?;
        let options = VerificationOptions {
            allowed_issuers: Some([issuer.url.clone()].into()),
            allowed_audiences: Some(issuer.audiences.clone()),
            time_tolerance: Some(coarsetime::Duration::from_secs(CLOCK_SKEW)),
            ..VerificationOptions::default()
        };
        let mut why = "its issuer publishes no key for it".to_owned();
        for key in keys.iter().filter(|key| is_named(key)) {
            match (key.verify)(token, &options) {
                Ok(_) if claims.get("exp").is_some_and(Value::is_i64) => return Ok(claims),
                Ok(_) => why = "it has no exp that is a whole number of seconds".into(),
                Err(e) => match e.downcast_ref() {
                    // All keys for other algorithms say so; it must not hide the true reason.
                    Some(JWTError::AlgorithmMismatch) => {}
                    Some(e) => why = JWTError::to_string(e),
                    None => why = "a part of it cannot be read".into(),
                },
            }
        }
        Err(invalid(&why))
    }
}

/// May they: verified claims against the rules, and who that makes the caller. Pure: touches nothing. Promises that
/// whoever matches nothing gets nothing.
mod policy {
    use super::{config::Rule, http::Answer, oidc::Claims, shown};
    use serde_json::Value;

    /// Claims that tell an operator whose job it was, where a token has them.
    const IDENTITY: [&str; 8] = [
        "sub",
        "repository",
        "ref",
        "event_name",
        "actor",
        "run_id",
        "project_path",
        "pipeline_id",
    ];

    /// Of the first rule that matches, the arguments for nix-daemon; and who the caller is, as `rule="…" sub="…" …`,
    /// every value escaped. Answers 403 if none does, with what did not fit the one that came nearest.
    pub fn authorize<'a>(
        rules: &'a [Rule],
        claims: &Claims,
    ) -> Result<(&'a [String], String), Answer> {
        let (mut nearest, mut why) = (usize::MAX, String::new());
        for rule in rules {
            let mut audiences = each(claims.get("aud")).iter().map(Value::as_str);
            if claims["iss"].as_str() != rule.issuer.as_deref()
                || !audiences.any(|to| to == rule.audience.as_deref())
            {
                continue;
            }
            let mut unfit = rule
                .bound_claims
                .iter()
                .filter(|(name, all)| !fits(rule, all, claims.get(*name)));
            let Some((name, _)) = unfit.next() else {
                let known = IDENTITY
                    .iter()
                    .filter_map(|n| Some(format!(" {n}={}", shown(&text(claims.get(*n)?)?))));
                let identity = format!("rule={}{}", shown(&rule.name), known.collect::<String>());
                return Ok((rule.extra_args.as_deref().unwrap_or_default(), identity));
            };
            let more = unfit.count();
            if more < nearest {
                let has = claims.get(name).map_or("missing".into(), |value| {
                    shown(&text(value).unwrap_or_default())
                });
                (nearest, why) = (
                    more,
                    format!("the token is good, but not for this relay: {name} is {has}"),
                );
            }
        }
        Err(Answer::new(403, &[], &why))
    }

    /// Whether one of the claim's values, or the only one, matches one of the patterns.
    fn fits(rule: &Rule, patterns: &Value, claim: Option<&Value>) -> bool {
        let case = |text: String| {
            if rule.ignores_case {
                text.to_ascii_lowercase()
            } else {
                text
            }
        };
        let patterns: Vec<String> = each(Some(patterns))
            .iter()
            .filter_map(text)
            .map(case)
            .collect();
        let mut values = each(claim).iter().filter_map(text).map(case);
        values.any(|value| patterns.iter().any(|pattern| matches(pattern, &value)))
    }

    fn each(value: Option<&Value>) -> &[Value] {
        value.map_or(&[], |value| {
            value
                .as_array()
                .map_or(std::slice::from_ref(value), Vec::as_slice)
        })
    }

    /// A string; a number or a boolean as JSON prints it; nothing else.
    fn text(value: &Value) -> Option<String> {
        let printed = (value.is_number() || value.is_boolean()).then(|| value.to_string());
        value.as_str().map(str::to_owned).or(printed)
    }

    /// A `*` stands for any run of characters, all else for itself.
    fn matches(pattern: &str, text: &str) -> bool {
        let Some((start, rest)) = pattern.split_once('*') else {
            return pattern == text;
        };
        let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
        let mut left = text.strip_prefix(start);
        // Of all places for a part the first is best: it leaves the most to what follows.
        for part in middle.split('*') {
            left = left.and_then(|text| Some(text.split_once(part)?.1));
        }
        left.is_some_and(|text| text.ends_with(end))
    }
}

/// A request head in, a status out; nothing else of HTTP (RFC 9110, RFC 9112, RFC 6455 section 4). Reads and writes
/// the client's socket. Promises that every wait ends by a deadline, that a head is never longer than 16 KiB, and
/// that no answer is lost to a reset because the client still sends.
mod http {
    use super::{poll, shown};
    use jwt_simple::reexports::ct_codecs::{Base64, Decoder};
    use std::{
        fmt::Display, io, io::Read, io::Write, net::Shutdown, net::TcpStream, time::Duration,
        time::Instant,
    };
    use tungstenite::handshake::server::{create_response, write_response};
    use tungstenite::http::{HeaderValue, Request, StatusCode, Version, header};

    /// So no token is longer, either.
    const MAX_HEAD_BYTES: usize = 16 << 10;

    type Headers = &'static [(&'static str, &'static str)];
    const NO_TOKEN: Headers = &[("WWW-Authenticate", "Bearer realm=\"nix-relay\"")];
    pub const INVALID_TOKEN: Headers = &[(
        "WWW-Authenticate",
        "Bearer realm=\"nix-relay\", error=\"invalid_token\"",
    )];
    pub const RETRY: Headers = &[("Retry-After", "5")];
    const UPGRADE: Headers = &[("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")];

    /// Any answer but 101: a status, and one line that says what is wrong and what would mend it.
    pub struct Answer {
        pub status: u16,
        pub line: String,
        /// What only the log is told.
        pub cause: String,
        headers: Headers,
    }

    impl Answer {
        pub fn new(status: u16, headers: Headers, line: &str) -> Answer {
            Answer {
                status,
                headers,
                line: line.into(),
                cause: String::new(),
            }
        }

        pub fn because(self, cause: impl Display) -> Answer {
            Answer {
                cause: format!(": {cause}"),
                ..self
            }
        }

        /// Sends it, gives the client `linger` to hear it, and ends the connection.
        pub fn send(
            &self,
            mut socket: &TcpStream,
            with_body: bool,
            linger: Duration,
        ) -> io::Result<()> {
            let status = StatusCode::from_u16(self.status).map_err(io::Error::other)?;
            let (kind, length) = ("text/plain; charset=utf-8", self.line.len() + 1);
            let headers: String = self
                .headers
                .iter()
                .map(|(name, value)| format!("{name}: {value}\r\n"))
                .collect();
            let body = if with_body {
                format!("{}\n", self.line)
            } else {
                String::new()
            };
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{headers}"
            );
            socket.write_all(format!("{head}Connection: close\r\n\r\n{body}").as_bytes())?;
            self::linger(socket, linger)
        }
    }

    /// Ends our side of a connection, and waits for the client to end its own. What it still sends is read: left
    /// unread, it would make the kernel send a reset, which can overtake our last words.
    pub fn linger(mut socket: &TcpStream, limit: Duration) -> io::Result<()> {
        socket.shutdown(Shutdown::Write)?;
        let until = Instant::now() + limit;
        while poll::readable(socket, until) && socket.read(&mut [0; 4096])? > 0 {}
        Ok(())
    }

    /// A request head, and what came behind it.
    pub struct Head {
        pub request: Request<()>,
        pub rest: Vec<u8>,
    }

    impl Head {
        /// `None`: the client left before it had sent a whole head.
        pub fn read(mut socket: &TcpStream, deadline: Instant) -> Result<Option<Head>, Answer> {
            let (mut bytes, mut length) = (vec![0; MAX_HEAD_BYTES], 0);
            while length < MAX_HEAD_BYTES {
                if poll::readable(socket, deadline) {
                    let more = socket.read(&mut bytes[length..]).unwrap_or(0);
                    length += more;
                    let head = Head::parse(&bytes[..length])?;
                    if head.is_some() || more == 0 {
                        return Ok(head);
                    }
                } else if Instant::now() >= deadline {
                    return Err(Answer::new(
                        408,
                        &[],
                        "the request head did not come in time",
                    ));
                }
            }
            Err(Answer::new(
                431,
                &[],
                "the request head is longer than 16 KiB",
            ))
        }

        /// tungstenite's own parser knows GET alone; others must hear 405, and HEAD its answer.
        fn parse(bytes: &[u8]) -> Result<Option<Head>, Answer> {
            let bad = |e: &dyn Display| Answer::new(400, &[], &format!("not HTTP/1.1: {e}"));
            let mut headers = [httparse::EMPTY_HEADER; 100];
            let mut parsed = httparse::Request::new(&mut headers);
            let length = match parsed.parse(bytes) {
                Ok(httparse::Status::Partial) => return Ok(None),
                Ok(httparse::Status::Complete(length)) => length,
                Err(e @ httparse::Error::TooManyHeaders) => {
                    return Err(Answer::new(431, &[], &e.to_string()));
                }
                Err(e) => return Err(bad(&e)),
            };
            let version = if parsed.version == Some(1) {
                Version::HTTP_11
            } else {
                Version::HTTP_10
            };
            let (method, uri) = (
                parsed.method.unwrap_or_default(),
                parsed.path.unwrap_or_default(),
            );
            let request = Request::builder().method(method).uri(uri).version(version);
            let request = parsed
                .headers
                .iter()
                .fold(request, |request, h| request.header(h.name, h.value));
            Ok(Some(Head {
                request: request.body(()).map_err(|e| bad(&e))?,
                rest: bytes[length..].to_vec(),
            }))
        }

        /// The bytes of the 101, if this is a WebSocket upgrade (RFC 6455, section 4.2).
        pub fn switching_protocols(&self) -> Result<Vec<u8>, Answer> {
            let refused = |e| {
                Answer::new(
                    426,
                    UPGRADE,
                    &format!("this is a WebSocket, which client.sh can open: {e}"),
                )
            };
            let mut response = create_response(&self.request).map_err(refused)?;
            let (name, mut bytes) = (header::SEC_WEBSOCKET_PROTOCOL, Vec::new());
            let offers = self.request.headers().get_all(&name).iter();
            let mut offers = offers.flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
            if offers.any(|offer| offer.trim_ascii() == b"binary") {
                response
                    .headers_mut()
                    .insert(name, HeaderValue::from_static("binary"));
            }
            write_response(&mut bytes, &response).map_err(refused)?;
            Ok(bytes)
        }

        /// What a proxy, or whoever claims to be one, says of where the request came from; for the log.
        pub fn forwarded_for(&self) -> String {
            let said = self.request.headers().get_all("X-Forwarded-For").iter();
            let said: Vec<_> = said
                .map(|value| String::from_utf8_lossy(value.as_bytes()))
                .collect();
            if said.is_empty() {
                String::new()
            } else {
                format!(" forwarded_for={}", shown(&said.join(", ")))
            }
        }

        /// The token of `Authorization: Bearer` (RFC 6750), or of `Basic` as its password.
        pub fn token(&self) -> Result<String, Answer> {
            let mut all = self.request.headers().get_all(header::AUTHORIZATION).iter();
            let text = all
                .next()
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default();
            if all.next().is_some() {
                return Err(Answer::new(400, &[], "more than one Authorization header"));
            }
            let (scheme, rest) = text.split_once(' ').unwrap_or_default();
            let basic =
                |pair: Vec<u8>| Some(String::from_utf8(pair).ok()?.split_once(':')?.1.to_owned());
            let token = match scheme.to_ascii_lowercase().as_str() {
                "bearer" => Some(rest.trim().to_owned()),
                "basic" => Base64::decode_to_vec(rest.trim(), None)
                    .ok()
                    .and_then(basic),
                _ => None,
            };
            let line = "send an OIDC token, as a Bearer token or as the password of Basic";
            token.ok_or_else(|| Answer::new(401, NO_TOKEN, line))
        }
    }
}

/// What every wait for a client or a child rests on: poll(2), with a limit.
mod poll {
    use rustix::event::{PollFd, PollFlags, Timespec};
    use std::{os::fd::AsFd, time::Instant};

    /// A descriptor to wait for, if there is one.
    pub fn on(fd: &Option<impl AsFd>, events: PollFlags) -> Option<PollFd<'_>> {
        fd.as_ref().map(|fd| PollFd::new(fd, events))
    }

    /// Waits until it can be read, or is broken; or, then false, until the time has come, and now and then less.
    pub fn readable(fd: &impl AsFd, until: Instant) -> bool {
        !ready([Some(PollFd::new(fd, PollFlags::IN))], until)[0].is_empty()
    }

    /// Waits until a descriptor is ready for its events (or broken, which always counts) or until the time has come,
    /// and says what each is ready for: nothing, at the deadline and now and then without a reason.
    pub fn ready<const N: usize>(fds: [Option<PollFd<'_>>; N], until: Instant) -> [PollFlags; N] {
        let mut polled: Vec<_> = fds.iter().flatten().cloned().collect();
        let left = until.saturating_duration_since(Instant::now());
        // It fails when a signal comes, and when memory is short: both pass.
        let _ = rustix::event::poll(&mut polled, Timespec::try_from(left).ok().as_ref());
        let mut answers = polled.iter().map(PollFd::revents);
        fds.map(|fd| {
            fd.and_then(|_| answers.next())
                .unwrap_or(PollFlags::empty())
        })
    }
}

/// nix-daemon on one side, the WebSocket on the other, and how it ends. Owns the connection and the child. Promises
/// that neither direction ever waits for the other, that each session ends in `Session::run` with one `End`, from
/// which log and Close are made, and that by then the child is reaped and its process group gone.
mod session {
    use super::{admin, config::Config, http, poll, secs, shown};
    use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
    use rustix::{
        event::PollFd, event::PollFlags, io::Errno, io::ioctl_fionread, net::SendFlags, net::send,
    };
    use rustix::{pipe::SpliceFlags, pipe::splice};
    use std::io::{self, ErrorKind, Read, Write};
    use std::os::{
        fd::BorrowedFd, fd::OwnedFd, unix::process::CommandExt, unix::process::ExitStatusExt,
    };
    use std::process::{Child, ChildStdout, Command, Stdio};
    use std::{env, iter, net::Shutdown, net::TcpStream, sync::Arc, time::Duration, time::Instant};
    use tungstenite::protocol::frame::{
        CloseFrame, Frame, FrameHeader, coding::Data, coding::OpCode,
    };
    use tungstenite::protocol::{Role, WebSocketConfig};
    use tungstenite::{Bytes, Error, Message, WebSocket, error::ProtocolError};
    use {log::info, log::warn};

    /// For the larger pipes of all sessions. An unprivileged user whose pipes hold more than 64 MiB is given tiny ones
    /// from then on (pipe(7)), and an output pipe is a quarter of an input pipe, which gains less from more.
    const PIPES_BYTES: u32 = 40 << 20;
    /// With more in a read, which tungstenite clears memory for, bytes leave the cache between steps.
    const READ_BYTES: usize = 64 << 10;
    /// Less is copied: of what is spliced, whole pages stay in the socket's queue, which counts only the bytes in them.
    const MIN_SPLICE_BYTES: u64 = 32 << 10;
    const MAX_MESSAGE_BYTES: usize = 16 << 20;
    /// Of the child's standard error, in the log.
    const MAX_LINE_BYTES: usize = 4 << 10;
    /// RFC 6455, section 5.5: a control frame holds 125 bytes, and the code of a Close is two.
    const MAX_REASON_BYTES: usize = 123;
    /// With more of them unsent, of further pongs the last one does (RFC 6455, section 5.5.3).
    const MAX_PONG_BYTES: usize = 4 << 10;
    /// Intervals without a sign of life after which a client counts as gone.
    const KEEPALIVES: u32 = 3;
    /// The client has so long to take a Close, and again to end the connection after it.
    const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
    /// And so long to take, and before it, what a child left that has exited.
    const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
    /// How many seconds a child has whose session is over, and what it hears after them. Its standard input is closed
    /// by then: that makes nix-daemon cancel its builds and let go of its locks. The last step, which only the kernel
    /// can delay, is repeated.
    const LADDER: [(u32, Signal); 2] = [(10, Signal::TERM), (5, Signal::KILL)];

    /// A running child, leader of a process group of its own. Dropped, it is killed and reaped.
    pub struct Daemon {
        child: Child,
        /// Readable once it has exited.
        exit: Option<OwnedFd>,
        /// Of its standard error: the line that is not whole yet, and the one before.
        line: Vec<u8>,
        last_line: String,
    }

    impl Daemon {
        /// Fails if the program cannot be run, with why.
        pub fn spawn(config: &Config, arguments: &[String]) -> io::Result<Daemon> {
            let mut command = Command::new(&config.nix_daemon_path);
            command
                .args(arguments)
                .current_dir("/")
                .process_group(0)
                .env_remove("NOTIFY_SOCKET");
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            let ours = |name: &str| name.starts_with("NIX_RELAY_") || name.starts_with("ACTIONS_");
            for (name, _) in env::vars_os().filter(|(name, _)| ours(&name.to_string_lossy())) {
                command.env_remove(name);
            }
            let (line, last_line) = (Vec::new(), String::from("it gave no reason"));
            let mut daemon = Daemon {
                child: command.spawn()?,
                exit: None,
                line,
                last_line,
            };
            daemon.exit = Some(pidfd_open(
                Pid::from_child(&daemon.child),
                PidfdFlags::empty(),
            )?);
            if let (Some(stdin), Some(stdout)) = (&daemon.child.stdin, &daemon.child.stdout) {
                rustix::io::ioctl_fionbio(stdin, true)?;
                let size = 1
                    << (PIPES_BYTES / config.max_connections)
                        .max(1)
                        .ilog2()
                        .clamp(18, 20);
                // May be refused to an unprivileged user; then smaller pipes do.
                let _ = rustix::pipe::fcntl_setpipe_size(stdin, size);
                let _ = rustix::pipe::fcntl_setpipe_size(stdout, size / 4);
            }
            Ok(daemon)
        }

        /// As much of the input as it takes at once.
        fn feed(&mut self, input: &mut Bytes) {
            match self
                .child
                .stdin
                .as_mut()
                .map_or(Ok(input.len()), |stdin| stdin.write(input))
            {
                Ok(written) => drop(input.split_to(written)),
                Err(e) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&e.kind()) => {}
                // It wants no more, but may still have something to say.
                Err(_) => (self.child.stdin, *input) = (None, Bytes::new()),
            }
        }

        /// What it has written to its standard error, line by line, to the log.
        fn log_stderr(&mut self, session: u64) {
            let mut chunk = [0; MAX_LINE_BYTES];
            let length = self
                .child
                .stderr
                .as_mut()
                .map_or(0, |pipe| pipe.read(&mut chunk).unwrap_or(0));
            self.child.stderr = self.child.stderr.take().filter(|_| length > 0);
            for &byte in &chunk[..length] {
                self.line.push(byte);
                if byte == b'\n' || self.line.len() == MAX_LINE_BYTES {
                    self.end_line(session);
                }
            }
        }

        fn end_line(&mut self, session: u64) {
            if !self.line.trim_ascii().is_empty() {
                self.last_line = String::from_utf8_lossy(self.line.trim_ascii_end()).into_owned();
                info!(
                    "nix-daemon says session={session} line={:?}",
                    self.last_line
                );
            }
            self.line.clear();
        }

        /// Whether it exits in time; if so, with all that it says before that in the log, as far as there is time.
        fn exits(&mut self, session: u64, until: Instant) -> bool {
            loop {
                let fds = [
                    poll::on(&self.exit, PollFlags::IN),
                    poll::on(&self.child.stderr, PollFlags::IN),
                ];
                let [exit, stderr] = poll::ready(fds, until);
                if !stderr.is_empty() {
                    self.log_stderr(session);
                }
                if Instant::now() >= until || stderr.is_empty() && !exit.is_empty() {
                    return !exit.is_empty();
                }
            }
        }

        /// Sees to it that the child ends, and its group; says whether all was well, and how it did.
        fn end(&mut self, session: u64) -> (bool, String) {
            (self.child.stdin, self.child.stdout) = (None, None);
            for (wait, signal) in LADDER.into_iter().chain(iter::repeat(LADDER[1])) {
                if self.exits(session, Instant::now() + secs(wait)) {
                    break;
                }
                warn!(
                    "nix-daemon outlives its session session={session} signal={}",
                    signal.as_raw()
                );
                let _ = kill_process_group(Pid::from_child(&self.child), signal);
            }
            self.end_line(session);
            // Before the child is reaped: after that, another group may have the number.
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            match self
                .child
                .wait()
                .map(|status| status.code().ok_or(status.signal().unwrap_or_default()))
            {
                Ok(Ok(code)) => (code == 0, format!("nix-daemon exited with status {code}")),
                Ok(Err(signal)) => (false, format!("nix-daemon was killed by signal {signal}")),
                Err(e) => (false, format!("nix-daemon is lost: {e}")),
            }
        }
    }

    impl Drop for Daemon {
        fn drop(&mut self) {
            if let Ok(None) = self.child.try_wait() {
                let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
                let _ = self.child.wait();
            }
        }
    }

    /// The connection, which never blocks. Where writing fails for good, the next poll says that it is broken.
    struct Wire {
        socket: Arc<TcpStream>,
        /// What could not be sent yet, and how much of the child's output still belongs to the frame that it ends with:
        /// that goes from pipe to socket without a copy.
        unsent: Vec<u8>,
        owed: usize,
    }

    impl Wire {
        fn is_idle(&self) -> bool {
            self.unsent.is_empty() && self.owed == 0
        }

        /// Sends as much as the socket takes at once.
        fn send(&mut self, stdout: &Option<ChildStdout>) {
            if !self.unsent.is_empty() {
                let more = if self.owed > 0 {
                    SendFlags::MORE
                } else {
                    SendFlags::empty()
                };
                self.unsent
                    .drain(..send(&self.socket, &self.unsent, more).unwrap_or(0));
            }
            if let (true, 1.., Some(stdout)) = (self.unsent.is_empty(), self.owed, stdout) {
                match splice(
                    stdout,
                    None,
                    &self.socket,
                    None,
                    self.owed,
                    SpliceFlags::empty(),
                ) {
                    Ok(sent @ 1..) => self.owed -= sent,
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    _ => drop(self.socket.shutdown(Shutdown::Both)),
                }
            }
        }

        /// Sends all of it, if the client takes it in time.
        fn finish(&mut self, stdout: &Option<ChildStdout>, until: Instant) {
            let mut broken = false;
            while !self.is_idle() && !broken && Instant::now() < until {
                let [ready] = poll::ready([Some(PollFd::new(&self.socket, PollFlags::OUT))], until);
                broken = ready.intersects(BROKEN);
                self.send(stdout);
            }
        }
    }

    impl Read for Wire {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            (&*self.socket).read(buffer)
        }
    }

    /// tungstenite pings and answers pings here, in whole frames, and keeps those that wait for the end of another.
    impl Write for Wire {
        fn write(&mut self, frame: &[u8]) -> io::Result<usize> {
            if !self.is_idle() {
                return Err(ErrorKind::WouldBlock.into());
            }
            self.unsent.extend_from_slice(frame);
            self.send(&None);
            Ok(frame.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Why a session ended: a name, the code of the client's Close if it gets one (RFC 6455, section 7.4.1), details.
    struct End(&'static str, Option<u16>, String);

    const EXITED: &str = "daemon-exited";
    const BROKEN: PollFlags = PollFlags::HUP.union(PollFlags::ERR);
    const HUNG_UP: ProtocolError = ProtocolError::ResetWithoutClosingHandshake;

    fn end(
        name: &'static str,
        code: impl Into<Option<u16>>,
        detail: impl ToString,
    ) -> Result<(), End> {
        Err(End(name, code.into(), detail.to_string()))
    }

    /// One client and one child.
    pub struct Session {
        number: u64,
        client: WebSocket<Wire>,
        /// tungstenite may hold what it has read already, or what came behind the request.
        buffered: bool,
        daemon: Daemon,
        /// What the client sent and the child has not taken yet.
        input: Bytes,
        keepalive: Duration,
        /// When the client last gave a sign of life.
        alive: Instant,
        ping: Instant,
        deadline: Instant,
        bytes_in: u64,
        bytes_out: u64,
    }

    impl Session {
        /// `switching` is the 101, to be sent first, and `rest` what came behind the request.
        #[rustfmt::skip]
        pub fn new(
            number: u64, config: &Config, socket: Arc<TcpStream>, (switching, rest): (Vec<u8>, Vec<u8>), daemon: Daemon,
        ) -> io::Result<Session> {
            let (now, timeout) = (Instant::now(), secs(config.timeout_secs));
            // None at all is one that is as long as the session.
            let keepalive = if config.keepalive_secs > 0 { secs(config.keepalive_secs) } else { timeout };
            // For a peer that vanishes while nothing is read from it, in milliseconds.
            let limit = (keepalive * KEEPALIVES).as_millis().min(i32::MAX as u128) as u32;
            rustix::net::sockopt::set_tcp_user_timeout(&socket, limit)?;
            socket.set_nonblocking(true)?;
            let limits = WebSocketConfig::default().read_buffer_size(READ_BYTES).write_buffer_size(0);
            let limits = limits.max_write_buffer_size(MAX_PONG_BYTES);
            let limits = limits.max_message_size(Some(MAX_MESSAGE_BYTES)).max_frame_size(Some(MAX_MESSAGE_BYTES));
            let (wire, buffered) = (Wire { socket, unsent: switching, owed: 0 }, !rest.is_empty());
            let client = WebSocket::from_partially_read(wire, rest, Role::Server, Some(limits));
            Ok(Session {
                number, client, buffered, daemon, input: Bytes::new(), keepalive,
                alive: now, ping: now + keepalive, deadline: now + timeout, bytes_in: 0, bytes_out: 0,
            })
        }

        /// Carries bytes until it is over, which `closing` can make it; then ends both sides, and logs how that went.
        pub fn run(mut self, closing: BorrowedFd<'_>) {
            let start = Instant::now();
            admin::add("sessions_active", 1.0);
            let End(reason, code, mut detail) = loop {
                if let Err(end) = self.turn(closing) {
                    break end;
                }
            };
            self.daemon.child.stdin = None;
            if reason != EXITED {
                self.hang_up(code, &detail, CLOSE_TIMEOUT);
            }
            let (success, fate) = self.daemon.end(self.number);
            if reason == EXITED {
                detail = if success {
                    detail
                } else {
                    format!("{fate}: {}", self.daemon.last_line)
                };
                self.hang_up(
                    Some(if success { 1000 } else { 1011 }),
                    &detail,
                    DRAIN_TIMEOUT,
                );
            }
            let (number, secs, detail) =
                (self.number, start.elapsed().as_secs_f64(), shown(&detail));
            let (bytes_in, bytes_out) = (self.bytes_in, self.bytes_out);
            admin::add_session(reason, secs);
            info!(
                "session ended session={number} reason={reason} detail={detail} secs={secs:.3} \
                 bytes_in={bytes_in} bytes_out={bytes_out} exit={fate:?}"
            );
        }

        /// Waits for what happens next, and does what that asks for. Nothing else in here waits, so no direction does.
        fn turn(&mut self, closing: BorrowedFd<'_>) -> Result<(), End> {
            let (wire, daemon) = (self.client.get_ref(), &self.daemon);
            // The child waits while the client has not taken this, and the client while the child has input to take.
            let (full, listening) = (!wire.is_idle(), self.input.is_empty());
            let mut wanted = PollFlags::empty();
            wanted.set(PollFlags::IN, listening);
            wanted.set(PollFlags::OUT, full);
            let fds = [
                Some(PollFd::new(&wire.socket, wanted)),
                poll::on(&daemon.child.stdin, PollFlags::OUT).filter(|_| !listening),
                poll::on(&daemon.child.stdout, PollFlags::IN).filter(|_| !full),
                poll::on(&daemon.child.stderr, PollFlags::IN),
                poll::on(&daemon.exit, PollFlags::IN).filter(|_| !full),
                Some(PollFd::new(&closing, PollFlags::IN)),
            ];
            let silence = self.alive + self.keepalive * KEEPALIVES;
            let until = if listening && self.buffered {
                self.alive
            } else {
                self.deadline.min(self.ping).min(silence)
            };
            let [client, stdin, stdout, stderr, exit, closing] = poll::ready(fds, until);
            let broken = client.intersects(BROKEN);

            if client.contains(PollFlags::OUT) {
                self.client.get_mut().send(&self.daemon.child.stdout);
                // A pong may have waited for that.
                let _ = self.client.flush();
            }
            if !stdin.is_empty() {
                self.daemon.feed(&mut self.input);
            }
            if !stderr.is_empty() {
                self.daemon.log_stderr(self.number);
            }
            if !stdout.is_empty() || !exit.is_empty() {
                let (stdout, wire) = (&mut self.daemon.child.stdout, self.client.get_mut());
                let length = stdout
                    .as_ref()
                    .map_or(0, |stdout| ioctl_fionread(stdout).unwrap_or(0));
                // It has closed its output, or exited with nothing left in there.
                if length == 0 {
                    return end(EXITED, None, "");
                }
                self.bytes_out += length;
                admin::add("bytes_total{direction=\"out\"}", length as f64);
                let frame = FrameHeader {
                    opcode: OpCode::Data(Data::Binary),
                    ..FrameHeader::default()
                };
                let _ = frame.format(length, &mut wire.unsent);
                match stdout {
                    Some(stdout) if length < MIN_SPLICE_BYTES => {
                        let _ = stdout.by_ref().take(length).read_to_end(&mut wire.unsent);
                    }
                    _ => wire.owed = length as usize,
                }
                wire.send(stdout);
            }
            if listening && (self.buffered || broken || client.contains(PollFlags::IN)) {
                self.receive()?;
            } else if broken {
                return end("client-gone", None, "the connection broke");
            }
            let now = Instant::now();
            // It takes what is unsent; or it sends, if nothing was; or it may not send, and that is our doing.
            let sends =
                client.contains(PollFlags::IN) || !listening || !self.client.get_ref().is_idle();
            if client.contains(PollFlags::OUT) || !full && sends {
                self.alive = now;
            }
            if !closing.is_empty() {
                return end("shutting-down", 1001, "the relay is shutting down");
            } else if now >= self.deadline {
                return end("timed-out", 1008, "daemon.timeout_secs are over");
            } else if now >= self.alive + self.keepalive * KEEPALIVES {
                return end(
                    "client-gone",
                    None,
                    "it gave no sign of life for three keepalives",
                );
            } else if now >= self.ping {
                self.ping = now + self.keepalive;
                let _ = self.client.send(Message::Ping(Bytes::new()));
            }
            Ok(())
        }

        fn receive(&mut self) -> Result<(), End> {
            let message = self.client.read();
            self.buffered = message.is_ok();
            match message {
                Ok(Message::Binary(payload)) => {
                    self.bytes_in += payload.len() as u64;
                    admin::add("bytes_total{direction=\"in\"}", payload.len() as f64);
                    self.input = payload;
                    self.daemon.feed(&mut self.input);
                    Ok(())
                }
                Ok(Message::Text(_)) => {
                    end("protocol-error", 1003, "only binary messages carry data")
                }
                Ok(Message::Close(close)) => {
                    end("client-closed", close.map(|close| close.code.into()), "")
                }
                Ok(_) => Ok(()),
                Err(Error::Io(e)) if e.kind() == ErrorKind::WouldBlock => Ok(()),
                Err(Error::Capacity(e)) => end("protocol-error", 1009, e),
                Err(e @ Error::Utf8(_)) => end("protocol-error", 1007, e),
                Err(Error::Protocol(HUNG_UP)) => {
                    end("client-gone", None, "it hung up without a Close")
                }
                Err(Error::Protocol(e)) => end("protocol-error", 1002, e),
                Err(e) => end("client-gone", None, e),
            }
        }

        /// Sends a Close with this code, or with none (RFC 6455, section 5.5.1), and hangs up.
        fn hang_up(&mut self, code: Option<u16>, reason: &str, limit: Duration) {
            let reason = &reason[..reason.floor_char_boundary(MAX_REASON_BYTES)];
            let close = Frame::close(code.map(|code| CloseFrame {
                code: code.into(),
                reason: reason.into(),
            }));
            let (wire, stdout, until) = (
                self.client.get_mut(),
                &self.daemon.child.stdout,
                Instant::now() + limit,
            );
            wire.finish(stdout, until);
            if wire.is_idle() {
                let _ = close.format(&mut wire.unsent);
                wire.finish(stdout, until);
            }
            let _ = http::linger(&wire.socket, limit);
        }
    }
}

/// What the relay does, in numbers, as Prometheus reads them (text format 0.0.4). Touches nothing else. Promises that
/// no label holds what a client chose.
mod admin {
    use super::lock;
    use std::{collections::BTreeMap, sync::Mutex};

    const REASONS: &[&str] = &[
        "client-closed",
        "client-gone",
        "daemon-exited",
        "protocol-error",
        "shutting-down",
        "timed-out",
    ];
    const STATUSES: &[&str] = &[
        "400", "401", "403", "404", "405", "408", "426", "431", "502", "503",
    ];
    /// Name, type, help, label, and its values, which are there from the start: without a zero before it, the first
    /// event is no increase.
    const METRICS: [(&str, &str, &str, &str, &[&str]); 7] = [
        ("build_info", "gauge", "The version of nix-relay.", "", &[]),
        (
            "bytes_total",
            "counter",
            "Payload that came from clients, and went to them.",
            "direction",
            &["in", "out"],
        ),
        (
            "jwks_refreshes_total",
            "counter",
            "Fetches of an issuer's keys.",
            "result",
            &["ok", "error"],
        ),
        (
            "refusals_total",
            "counter",
            "Connections that got this status, and no session.",
            "status",
            STATUSES,
        ),
        (
            "session_seconds",
            "histogram",
            "How long sessions took.",
            "",
            &[],
        ),
        (
            "sessions_active",
            "gauge",
            "Sessions that have begun and not ended.",
            "",
            &[],
        ),
        (
            "sessions_total",
            "counter",
            "Sessions that have ended, by why.",
            "result",
            REASONS,
        ),
    ];
    const BUCKETS: [u32; 5] = [1, 10, 100, 1000, 10000];
    /// In the order of their names, which is right for all buckets but the widest: whether it is that one comes first.
    static SERIES: Mutex<BTreeMap<(bool, String), f64>> = Mutex::new(BTreeMap::new());

    /// Adds to a metric: its name, and its label if it has one.
    pub fn add(series: &str, value: f64) {
        *lock(&SERIES)
            .entry((series.contains("+Inf"), series.into()))
            .or_default() += value;
    }

    /// To be called once.
    pub fn start() {
        for (metric, _, _, label, values) in METRICS {
            values
                .iter()
                .for_each(|value| add(&format!("{metric}{{{label}={value:?}}}"), 0.0));
        }
        add("sessions_active", 0.0);
        add(
            concat!("build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"),
            1.0,
        );
    }

    /// Counts a session that has ended.
    pub fn add_session(result: &str, secs: f64) {
        add("sessions_active", -1.0);
        add(&format!("sessions_total{{result={result:?}}}"), 1.0);
        for limit in BUCKETS {
            add(
                &format!("session_seconds_bucket{{le=\"{limit}\"}}"),
                (secs <= limit.into()).into(),
            );
        }
        add("session_seconds_bucket{le=\"+Inf\"}", 1.0);
        add("session_seconds_count", 1.0);
        add("session_seconds_sum", secs);
    }

    /// All that was added up, in the text format.
    pub fn metrics() -> String {
        let (series, mut text) = (lock(&SERIES), String::new());
        for (name, kind, help, ..) in METRICS {
            text += &format!("# HELP nix_relay_{name} {help}\n# TYPE nix_relay_{name} {kind}\n");
            let own = series
                .iter()
                .filter(|((_, series), _)| series.starts_with(name));
            text.extend(own.map(|((_, series), value)| format!("nix_relay_{series} {value}\n")));
        }
        text
    }
}

/// Text that a client or an issuer chose, fit for a line of the log: quoted, escaped, cut short.
fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(256).collect::<String>())
}

fn secs(secs: impl Into<u32>) -> Duration {
    Duration::from_secs(secs.into().into())
}

/// A panic elsewhere must not become one here: what is behind these locks is valid at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// main: arguments, logging, the accept loops, who may be in, shutdown.

use signal_hook::{consts, iterator::Signals};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{
    collections::BTreeMap, env, fmt::Display, fs, io, io::PipeReader, io::Write, path::Path,
    process::ExitCode,
};
use std::{
    net::Shutdown, net::TcpListener, net::TcpStream, os::fd::AsFd, os::unix::fs::MetadataExt,
    thread,
};
use std::{time::Duration, time::Instant};
use {config::Config, http::Answer, http::Head, http::RETRY, session::Daemon, session::Session};
use {log::error, log::info, log::warn, sd_notify::NotifyState, sd_notify::notify};

const USAGE: &str = "usage: nix-relay [--check] [CONFIG.toml]    (or NIX_RELAY_CONFIG=CONFIG.toml)
Carries the Nix worker protocol from a WebSocket to nix-daemon, for callers with an OIDC token.
  --check    validate the configuration, print it as it is in effect, and exit
  --help     print this, and exit
  --version  print the version, and exit
";

/// Connections that have no session yet.
const MAX_HANDSHAKES: u32 = 256;
/// Before trying again when descriptors or threads have run out.
const SCARCITY_PAUSE: Duration = Duration::from_millis(100);
/// For an answer to be sent, which any socket has room for, and for the client to hear it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const LINGER: Duration = Duration::from_secs(1);
/// After the grace, for the sessions to end: as long as the ladder of `session` needs.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(19);

/// What every connection needs.
struct Relay {
    config: Config,
    issuers: Vec<Arc<oidc::Issuer>>,
    gate: Mutex<Gate>,
    gate_changed: Condvar,
    /// Hangs up when the sessions are to end.
    closing: PipeReader,
}

/// Who is in, and who may be.
#[derive(Default)]
struct Gate {
    connections: u32,
    /// The number of the latest.
    number: u64,
    /// Those of them, by number, whose request, or whose end after a refusal, we wait for.
    awaited: BTreeMap<u64, Arc<TcpStream>>,
    /// Sessions that may yet begin, and the number of the latest.
    permits: u32,
    session: u64,
    /// How many times the relay was told to stop; once is enough to let nobody in.
    signals: u32,
}

impl Relay {
    fn change<T>(&self, change: impl FnOnce(&mut Gate) -> T) -> T {
        let changed = change(&mut lock(&self.gate));
        self.gate_changed.notify_all();
        changed
    }

    fn wait(&self, limit: Duration, done: impl Fn(&Gate) -> bool) -> MutexGuard<'_, Gate> {
        let gate = self
            .gate_changed
            .wait_timeout_while(lock(&self.gate), limit, |g| !done(g));
        gate.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Something of the gate's, given back when dropped.
struct Held(Arc<Relay>, fn(&mut Gate));

impl Drop for Held {
    fn drop(&mut self) {
        self.0.change(self.1);
    }
}

fn main() -> ExitCode {
    let say = |text: &str| {
        print!("{text}");
        ExitCode::SUCCESS
    };
    let fail = |text: &str| {
        eprintln!("nix-relay: {}", text.trim_end());
        ExitCode::from(2)
    };
    let (checks, arguments): (Vec<_>, Vec<_>) = env::args_os()
        .skip(1)
        .partition(|argument| argument == "--check");
    let path = match &arguments[..] {
        [] => env::var_os("NIX_RELAY_CONFIG").unwrap_or_default(),
        [only] if only == "--help" => return say(USAGE),
        [only] if only == "--version" => {
            return say(concat!("nix-relay ", env!("CARGO_PKG_VERSION"), "\n"));
        }
        [only] if !only.to_string_lossy().starts_with('-') => only.clone(),
        _ => return fail(&format!("did not expect {arguments:?}\n{USAGE}")),
    };
    let path = Some(Path::new(&path)).filter(|path| !path.as_os_str().is_empty());
    let config = match config::load(path) {
        Ok((_, text)) if !checks.is_empty() => return say(&text),
        Ok((config, _)) => config,
        Err(e) => return fail(&e.trim_end().replace('\n', " ")),
    };
    let mut logger =
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    // The journal knows the time, and wants to be told the priority (systemd.exec(5), sd-daemon(3)).
    let stderr = fs::metadata("/dev/stderr")
        .map_or(String::new(), |at| format!("{}:{}", at.dev(), at.ino()));
    if env::var("JOURNAL_STREAM").is_ok_and(|journal| journal == stderr) {
        const PRIORITIES: [u8; 6] = [3, 3, 4, 6, 7, 7];
        logger.format(|to, record| {
            writeln!(
                to,
                "<{}>{}",
                PRIORITIES[record.level() as usize],
                record.args()
            )
        });
    }
    logger.init();
    let Err(e) = run(config) else {
        return ExitCode::SUCCESS;
    };
    error!("{e}");
    ExitCode::FAILURE
}

/// Until it was told to stop and nobody is left, or their time is over. Fails if it cannot start.
fn run(config: Config) -> io::Result<()> {
    let mut listeners = Vec::new();
    for (name, address) in [("relay", &config.listen), ("admin", &config.admin_listen)] {
        if !address.is_empty() {
            let taken = |e| io::Error::other(format!("cannot listen on {address}: {e}"));
            listeners.push((name, TcpListener::bind(address).map_err(taken)?));
        }
    }
    let mut signals = Signals::new([consts::SIGTERM, consts::SIGINT])?;
    let (grace, (closing, close)) = (secs(config.shutdown_grace_secs), io::pipe()?);
    let gate = Mutex::new(Gate {
        permits: config.max_connections.get(),
        ..Gate::default()
    });
    let (issuers, gate_changed) = (oidc::start(&config)?, Condvar::new());
    let relay = Arc::new(Relay {
        config,
        issuers,
        gate,
        gate_changed,
        closing,
    });
    admin::start();
    let thread = |name: &str| thread::Builder::new().name(name.into());
    for (name, listener) in listeners {
        info!("{name} listening address={}", listener.local_addr()?);
        let relay = relay.clone();
        thread(name).spawn(move || accept(&relay, &listener, name == "admin"))?;
    }
    let signalled = relay.clone();
    let count = move || {
        signals
            .forever()
            .for_each(|_| signalled.change(|gate| gate.signals += 1))
    };
    thread("signals").spawn(count)?;
    let _ = notify(&[NotifyState::Ready]);
    while relay.wait(Duration::MAX, |gate| gate.signals > 0).signals == 0 {}
    let _ = notify(&[NotifyState::Stopping]);
    info!("shutting down grace_secs={}", grace.as_secs());
    drop(relay.wait(grace, |gate| gate.connections == 0 || gate.signals > 1));
    drop(close);
    let left = relay
        .wait(SHUTDOWN_TIMEOUT, |gate| gate.connections == 0)
        .connections;
    info!("shut down connections_left={left}");
    Ok(())
}

/// Hands every connection to a thread of its own. Nothing ends this. Where too many have no session yet, the one that
/// we have waited for longest must go, so that silent clients keep nobody out.
fn accept(relay: &Arc<Relay>, listener: &TcpListener, admin: bool) {
    loop {
        let Ok((socket, peer)) = listener
            .accept()
            .inspect_err(|e| warn!("cannot accept error={e:?}"))
        else {
            thread::sleep(SCARCITY_PAUSE);
            continue;
        };
        let socket = Arc::new(socket);
        let _ = socket
            .set_write_timeout(Some(ANSWER_TIMEOUT))
            .and(socket.set_nodelay(true));
        let number = relay.change(|gate| {
            if gate.connections
                >= MAX_HANDSHAKES + (relay.config.max_connections.get() - gate.permits)
            {
                // Its thread reads the end of the connection, and answers.
                let _ = gate.awaited.pop_first()?.1.shutdown(Shutdown::Read);
            }
            (gate.number, gate.connections) = (gate.number + 1, gate.connections + 1);
            gate.awaited.insert(gate.number, socket.clone());
            Some(gate.number)
        });
        let Some(number) = number else {
            refuse(
                &socket,
                &peer.to_string(),
                &busy("too many handshakes"),
                true,
                Duration::ZERO,
            );
            continue;
        };
        let visit = Held(relay.clone(), |gate| gate.connections -= 1);
        let (served, thread) = (
            socket.clone(),
            thread::Builder::new().name(format!("connection {number}")),
        );
        if let Err(e) =
            thread.spawn(move || serve(&visit.0, &served, peer.to_string(), number, admin))
        {
            relay.change(|gate| gate.awaited.remove(&number));
            refuse(&socket, &peer.to_string(), &busy(e), true, Duration::ZERO);
            thread::sleep(SCARCITY_PAUSE);
        }
    }
}

fn busy(cause: impl Display) -> Answer {
    Answer::new(503, RETRY, "the relay is busy; try again later").because(cause)
}

/// Answers something else than 101. All refusals are logged, but not how healthy we are.
fn refuse(socket: &TcpStream, peer: &str, answer: &Answer, with_body: bool, linger: Duration) {
    let (status, line) = (answer.status, &answer.line);
    if status != 200 && line != "draining" {
        admin::add(&format!("refusals_total{{status=\"{status}\"}}"), 1.0);
        info!(
            "refused peer={peer} status={status} reason={}",
            shown(&format!("{line}{}", answer.cause))
        );
    }
    let _ = answer.send(socket, with_body, linger);
}

/// One connection, from its first byte to its last.
fn serve(relay: &Arc<Relay>, socket: &Arc<TcpStream>, mut peer: String, number: u64, admin: bool) {
    let head = Head::read(
        socket,
        Instant::now() + secs(relay.config.handshake_timeout_secs),
    );
    let still_awaited = || relay.change(|gate| gate.awaited.remove(&number)).is_some();
    if !still_awaited() {
        return refuse(
            socket,
            &peer,
            &busy("too many handshakes"),
            true,
            Duration::ZERO,
        );
    }
    let mut with_body = true;
    if let Ok(Some(head)) = &head {
        peer += &head.forwarded_for();
        with_body = head.request.method() != "HEAD";
    }
    let served =
        head.and_then(|head| head.map_or(Ok(()), |head| admit(relay, socket, &peer, head, admin)));
    if let Err(answer) = served {
        relay.change(|gate| gate.awaited.insert(number, socket.clone()));
        refuse(socket, &peer, &answer, with_body, LINGER);
        still_awaited();
    }
}

/// The session that a request asks for, from its permit to its end; or why there is none.
fn admit(
    relay: &Arc<Relay>,
    socket: &Arc<TcpStream>,
    peer: &str,
    head: Head,
    admin: bool,
) -> Result<(), Answer> {
    let wrong_method = |allow| Answer::new(405, allow, "this path does not know the method");
    let draining = lock(&relay.gate).signals > 0;
    match (
        head.request.uri().path(),
        head.request.method().as_str(),
        admin,
    ) {
        ("/relay", "GET", false) => {}
        ("/relay", _, false) => return Err(wrong_method(&[("Allow", "GET")])),
        ("/metrics", "GET" | "HEAD", true) => {
            return Err(Answer::new(200, &[], admin::metrics().trim_end()));
        }
        ("/healthz", "GET" | "HEAD", _) if draining => {
            return Err(Answer::new(503, &[], "draining"));
        }
        ("/healthz", "GET" | "HEAD", _) => return Err(Answer::new(200, &[], "ok")),
        ("/metrics", _, true) | ("/healthz", ..) => {
            return Err(wrong_method(&[("Allow", "GET, HEAD")]));
        }
        _ => {
            return Err(Answer::new(
                404,
                &[],
                "there is nothing here; the relay is at /relay",
            ));
        }
    }
    let switching = head.switching_protocols()?;
    let claims = oidc::verify(&relay.issuers, &head.token()?)?;
    let (arguments, identity) = policy::authorize(&relay.config.rule, &claims)?;
    let mut gate = relay.wait(secs(relay.config.queue_timeout_secs), |gate| {
        gate.permits > 0 || gate.signals > 0
    });
    if gate.signals > 0 || gate.permits == 0 {
        let why = if gate.signals > 0 {
            "the relay is shutting down"
        } else {
            "all sessions are in use"
        };
        return Err(Answer::new(503, RETRY, &format!("{why}; try again later")));
    }
    (gate.permits, gate.session) = (gate.permits - 1, gate.session + 1);
    let number = gate.session;
    drop(gate);
    let _permit = Held(relay.clone(), |gate| gate.permits += 1);
    let program = &relay.config.nix_daemon_path;
    let failed = Answer::new(
        502,
        &[],
        "nix-daemon does not start; the relay's log has the cause",
    );
    let daemon = Daemon::spawn(&relay.config, arguments)
        .map_err(|e| failed.because(format!("{program}: {e}")))?;
    let session = Session::new(
        number,
        &relay.config,
        socket.clone(),
        (switching, head.rest),
        daemon,
    )
    .map_err(busy)?;
    info!("session opened session={number} peer={peer} {identity}");
    session.run(relay.closing.as_fd());
    Ok(())
}
