//! Tokens and keys: which are believed, which are not, and what the log says of that.

use crate::support::*;
use issuer::{AUDIENCE, ORG, keys, now, raw_claims};
use jwt_simple::prelude::{ECDSAP256KeyPairLike, ECDSAP384KeyPairLike, EdDSAKeyPairLike, MACLike, RSAKeyPairLike};
use jwt_simple::prelude::{ES256KeyPair, ES384KeyPair, HS256Key};
use jwt_simple::prelude::{PS256KeyPair, PS384KeyPair, PS512KeyPair, RS384KeyPair, RS512KeyPair};
use jwt_simple::reexports::ct_codecs::{Base64UrlSafeNoPadding, Decoder, Encoder};
use serde_json::Value;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

const DISCOVERY: &str = "/.well-known/openid-configuration";

fn encode(bytes: impl AsRef<[u8]>) -> String {
    Base64UrlSafeNoPadding::encode_to_string(bytes).unwrap()
}

/// A published key as JSON, changed; null takes a member away.
fn jwk(key: &str, changes: Value) -> Value {
    let mut jwk: Value = serde_json::from_str(key).unwrap();
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(jwk.as_object_mut().unwrap().remove(name)),
            value => jwk[name] = value.clone(),
        }
    }
    jwk
}

fn request(token: &str) -> Vec<u8> {
    upgrade_request(&format!("Authorization: Bearer {token}\r\n")).into_bytes()
}

/// Expects a status, a word of the reason in the log, and the token neither there nor in the answer.
fn refused(relay: &Relay, what: &str, token: &str, status: u16, why: &str) {
    let (answer, line) = relay.refused(&request(token));
    let about = format!("{what} was answered\n{answer}and logged\n{line}");
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "not {status}: {about}");
    assert!(line.contains(&format!(" status={status} reason=\"")), "{about}");
    assert!(line.to_lowercase().contains(why), "no {why:?}: {about}");
    for part in token.split('.').filter(|part| part.len() > 8) {
        assert!(!answer.contains(part) && !relay.log.text().contains(part), "told on: {about}");
    }
}

/// How many times the issuer was asked for its keys.
fn fetches(issuer: &Issuer) -> usize {
    issuer.requests().iter().filter(|path| *path == "/jwks").count()
}

#[test]
fn algorithms() {
    let issuer = Issuer::start();
    let p384 = ES384KeyPair::generate().with_key_id("p384");
    // Without `alg`, an RSA key is good for all of its algorithms.
    let set = [
        jwk(&keys().rsa.public_key().to_jwk(), json!({"alg": null})),
        jwk(&keys().p256.public_key().to_jwk(), json!({"alg": null, "use": null})),
        jwk(&keys().ed25519.public_key().to_jwk(), json!({})),
        jwk(&p384.public_key().to_jwk(), json!({})),
    ];
    issuer.answer("/jwks", 200, &json!({"keys": set}).to_string());
    let relay = Relay::start(&issuer);
    let claims = || raw_claims(&issuer.claims(json!({})));
    let der = &keys().rsa.to_der().unwrap();
    let tokens = [
        ("RS256", keys().rsa.sign(claims())),
        ("RS384", RS384KeyPair::from_der(der).unwrap().with_key_id("rsa").sign(claims())),
        ("RS512", RS512KeyPair::from_der(der).unwrap().with_key_id("rsa").sign(claims())),
        ("PS256", PS256KeyPair::from_der(der).unwrap().with_key_id("rsa").sign(claims())),
        ("PS384", PS384KeyPair::from_der(der).unwrap().with_key_id("rsa").sign(claims())),
        ("PS512", PS512KeyPair::from_der(der).unwrap().with_key_id("rsa").sign(claims())),
        ("ES256", keys().p256.sign(claims())),
        ("ES384", p384.sign(claims())),
        ("EdDSA", keys().ed25519.sign(claims())),
    ];
    for (algorithm, token) in tokens {
        let token = token.unwrap();
        let header = token.split('.').next().unwrap();
        let header = Base64UrlSafeNoPadding::decode_to_vec(header, None).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&header).unwrap()["alg"], algorithm);
        relay.connect(&token).close();
    }
}

#[test]
fn the_algorithm_that_a_key_names_is_its_only_one() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let claims = raw_claims(&issuer.claims(json!({})));
    let der = &keys().rsa.to_der().unwrap();
    let token = RS512KeyPair::from_der(der).unwrap().with_key_id("rsa").sign(claims).unwrap();
    refused(&relay, "RS512 with a key for RS256", &token, 401, "token does not verify");
}

#[test]
fn claims_that_are_let_in() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    for changes in [
        json!({}),
        json!({"exp": now() - 30}),
        json!({"nbf": now() + 30}),
        json!({"iat": now() + 30}),
        json!({"nbf": null, "iat": null, "sub": null}),
        json!({"aud": [AUDIENCE]}),
        json!({"aud": ["somebody-else", AUDIENCE, "another"]}),
        json!({"repository_owner": ORG.to_uppercase()}),
        json!({"exp": now() + 1_000_000_000}),
    ] {
        relay.connect(&issuer.token_with(changes)).close();
    }
    // Without the key's name, each that is published may have signed it.
    let unnamed = ES256KeyPair::from_bytes(&keys().p256.to_bytes()).unwrap();
    relay.connect(&unnamed.sign(raw_claims(&issuer.claims(json!({})))).unwrap()).close();
}

#[test]
fn claims_that_are_refused() {
    let issuer = Issuer::start();
    let mut relay = Relay::start(&issuer);
    let elsewhere = issuer.url().replace("127.0.0.1", "localhost");
    let rows = [
        ("expired by 61 s", json!({"exp": now() - 61}), 401, "expired"),
        ("expired long ago", json!({"exp": 0}), 401, "expired"),
        ("no exp", json!({"exp": null}), 401, "expires"),
        ("an exp that is text", json!({"exp": "tomorrow"}), 401, "cannot be read"),
        ("nbf in 120 s", json!({"nbf": now() + 120}), 401, "not valid yet"),
        ("iat in 120 s", json!({"iat": now() + 120}), 401, "clock"),
        ("another issuer", json!({"iss": elsewhere}), 401, "issuer"),
        ("nearly the issuer", json!({"iss": format!("{}/", issuer.url())}), 401, "issuer"),
        ("several issuers", json!({"iss": [issuer.url()]}), 401, "issuer"),
        ("no issuer", json!({"iss": null}), 401, "issuer"),
        ("another audience", json!({"aud": "somebody-else"}), 401, "audience"),
        ("other audiences", json!({"aud": ["somebody", "else"]}), 401, "audience"),
        ("nearly the audience", json!({"aud": format!("{AUDIENCE}/")}), 401, "audience"),
        ("no audience", json!({"aud": null}), 401, "audience"),
        ("empty audiences", json!({"aud": []}), 401, "audience"),
        ("another owner", json!({"repository_owner": "other"}), 403, "other"),
        ("nearly the owner", json!({"repository_owner": format!("{ORG}2")}), 403, "owner"),
        ("no owner", json!({"repository_owner": null}), 403, "owner"),
        ("an empty owner", json!({"repository_owner": ""}), 403, "owner"),
        ("an owner in a list", json!({"repository_owner": [ORG]}), 403, "owner"),
        ("a line for the log", json!({"repository_owner": "a\nrefused \r\"b\u{1b}"}), 403, "owner"),
    ];
    let expected = rows.len();
    for (what, changes, status, why) in rows {
        refused(&relay, what, &issuer.token_with(changes), status, why);
    }
    let log = relay.stop();
    let lines = log.lines().filter(|line| line.contains(" refused peer=")).count();
    assert_eq!((lines, log.contains("\nrefused"), log.contains('\u{1b}')), (expected, false, false));
}

#[test]
fn signatures_that_are_refused() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let claims = || raw_claims(&issuer.claims(json!({})));
    let claims_as_text = issuer.claims(json!({})).to_string();
    let (rsa, good) = (&keys().rsa, issuer.token());
    let parts: Vec<_> = good.split('.').collect();
    let [header, payload, signature] = parts[..] else { panic!("{good}") };
    let hmac = |key: &[u8]| HS256Key::from_bytes(key).with_key_id("rsa").authenticate(claims()).unwrap();
    let headed = |header: Value| format!("{}.{payload}.{signature}", encode(header.to_string()));
    let none = |name: &str, key: Value| {
        let header = json!({"typ": "JWT", "alg": name, "kid": key}).to_string();
        format!("{}.{}.", encode(header), encode(&claims_as_text))
    };
    let p256_as = |id: &str| {
        let key = ES256KeyPair::from_bytes(&keys().p256.to_bytes()).unwrap().with_key_id(id);
        key.sign(claims()).unwrap()
    };
    let changed = issuer.claims(json!({"sub": "repo:example-org/other"})).to_string();
    let mut flipped = Base64UrlSafeNoPadding::decode_to_vec(signature, None).unwrap();
    flipped[40] ^= 1;
    let unverified = "token does not verify";
    let rows = [
        ("none", none("none", json!("p256")), unverified),
        ("None, of no key", none("None", Value::Null), unverified),
        ("HS256 with the key as PEM", hmac(rsa.public_key().to_pem().unwrap().as_bytes()), unverified),
        ("HS256 with the key as JWK", hmac(rsa.public_key().to_jwk().as_bytes()), unverified),
        ("HS256 with the key as DER", hmac(&rsa.public_key().to_der().unwrap()), unverified),
        ("another payload", format!("{header}.{}.{signature}", encode(changed)), "signature"),
        ("another signature", format!("{header}.{payload}.{}", encode(flipped)), "signature"),
        ("no signature", format!("{header}.{payload}."), unverified),
        ("a short signature", format!("{header}.{payload}.{}", encode([0; 8])), unverified),
        ("a signature of zeros", format!("{header}.{payload}.{}", encode([0; 64])), unverified),
        ("a key not in the set", keys().unpublished.sign(claims()).unwrap(), "publishes no key"),
        ("ES256 with an RSA key", p256_as("rsa"), unverified),
        ("ES256 with an Ed25519 key", p256_as("ed25519"), unverified),
        ("RS256 with a P-256 key", headed(json!({"alg": "RS256", "kid": "p256"})), unverified),
        ("a header unlike the signed", headed(json!({"alg": "ES256", "kid": "p256"})), "signature"),
        ("a critical extension", headed(json!({"alg": "ES256", "kid": "p256", "crit": ["b64"]})), "critical"),
        ("a key of its own", headed(json!({"alg": "ES256", "jwk": "{}"})), "signature"),
        ("no parts", "token".into(), unverified),
        ("two parts", format!("{header}.{payload}"), unverified),
        ("four parts", format!("{good}.{signature}"), unverified),
        ("empty parts", "..".into(), unverified),
        ("a header that is no JSON", format!("{}.{payload}.{signature}", encode("x")), unverified),
        ("a payload that is no JSON", format!("{header}.{}.{signature}", encode("x")), unverified),
        ("a payload that is a list", format!("{header}.{}.{signature}", encode("[]")), unverified),
        ("padding", format!("{header}=.{payload}=.{signature}="), unverified),
    ];
    for (what, token, why) in rows {
        refused(&relay, what, &token, 401, why);
    }
    relay.connect(&good).close();
}

#[test]
fn long_tokens() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let padded = |length| issuer.token_with(json!({"padding": "p".repeat(length)}));
    let long = padded(11 << 10);
    assert!(long.len() > 15 << 10 && request(&long).len() < 16 << 10);
    relay.connect(&long).close();
    refused(&relay, "a token over 16 KiB", &padded(12 << 10), 431, "16 kib");
}

#[test]
fn keys_that_cannot_be_used_are_skipped() {
    let issuer = Issuer::start();
    let rsa = jwk(&keys().rsa.public_key().to_jwk(), json!({}));
    let modulus = Base64UrlSafeNoPadding::decode_to_vec(rsa["n"].as_str().unwrap(), None).unwrap();
    let mut weak = modulus[..128].to_vec();
    weak[127] |= 1;
    let p256 = keys().p256.public_key().to_jwk();
    let set = json!({"keys": [
        null, "key", {}, {"kty": 5},
        {"kty": "unknown", "kid": "unknown"},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "oct"},
        jwk(&rsa.to_string(), json!({"n": encode(weak), "kid": "weak"})),
        jwk(&p256, json!({"use": "enc", "kid": "enc"})),
        jwk(&p256, json!({"crv": "P-257", "kid": "curve"})),
        jwk(&p256, json!({"x": "AAAA", "kid": "short"})),
        jwk(&p256, json!({"kid": "good"})),
    ]});
    issuer.answer("/jwks", 200, &set.to_string());
    let relay = Relay::start(&issuer);
    let claims = || raw_claims(&issuer.claims(json!({})));
    let p256_as = |id: &str| {
        let key = ES256KeyPair::from_bytes(&keys().p256.to_bytes()).unwrap().with_key_id(id);
        key.sign(claims()).unwrap()
    };
    relay.connect(&p256_as("good")).close();
    for id in ["unknown", "oct", "enc", "curve", "short"] {
        refused(&relay, id, &p256_as(id), 401, "publishes no key");
    }
    let weak = keys().rsa.clone().with_key_id("weak").sign(claims()).unwrap();
    refused(&relay, "RSA of 1024 bits", &weak, 401, "publishes no key");
}

#[test]
fn an_issuer_that_cannot_be_believed() {
    let leads = |uri: &'static str| move |url: &str| json!({"issuer": url, "jwks_uri": uri}).to_string();
    let jwks = |url: &str| json!({"issuer": url, "jwks_uri": format!("{url}/jwks")}).to_string();
    let no_uri = |url: &str| json!({"issuer": url}).to_string();
    let another = |url: &str| jwks(url).replacen(url, "https://issuer.example.com", 1);
    let slash = |url: &str| jwks(url).replacen(url, &format!("{url}/"), 1);
    let nameless = |url: &str| json!({"jwks_uri": format!("{url}/jwks")}).to_string();
    let text = |text: &'static str| move |_: &str| text.to_owned();
    let elsewhere = |url: &str| format!("{url}/elsewhere");
    let long = |url: &str| jwks(url) + &" ".repeat(2 << 20);
    let long_set = |_: &str| {
        let key = jwk(&keys().p256.public_key().to_jwk(), json!({}));
        json!({"padding": "p".repeat(2 << 20), "keys": [key]}).to_string()
    };
    type Body<'a> = &'a dyn Fn(&str) -> String;
    let rows: [(&str, &str, u16, Body, &str); 23] = [
        ("another issuer", DISCOVERY, 200, &another, "issuer.example.com"),
        ("nearly the issuer", DISCOVERY, 200, &slash, "another issuer"),
        ("no issuer", DISCOVERY, 200, &nameless, "another issuer"),
        ("no jwks_uri", DISCOVERY, 200, &no_uri, "jwks_uri"),
        ("plain http", DISCOVERY, 200, &leads("http://192.0.2.1/jwks"), "jwks_uri"),
        ("plain http, by name", DISCOVERY, 200, &leads("http://localhost.example/"), "jwks_uri"),
        ("plain http, a user", DISCOVERY, 200, &leads("http://localhost@example.com/"), "jwks_uri"),
        ("a file", DISCOVERY, 200, &leads("file:///etc/passwd"), "jwks_uri"),
        ("a path", DISCOVERY, 200, &leads("/jwks"), "jwks_uri"),
        ("no host", DISCOVERY, 200, &leads("https://"), "jwks_uri"),
        ("junk", DISCOVERY, 200, &text("<html>"), DISCOVERY),
        ("nothing", DISCOVERY, 200, &text(""), DISCOVERY),
        ("a list", DISCOVERY, 200, &text("[]"), "another issuer"),
        ("500", DISCOVERY, 500, &jwks, "500"),
        ("204", DISCOVERY, 204, &text(""), "204"),
        ("a redirect", DISCOVERY, 302, &elsewhere, DISCOVERY),
        ("2 MiB", DISCOVERY, 200, &long, DISCOVERY),
        ("junk for keys", "/jwks", 200, &text("<html>"), "/jwks"),
        ("no keys", "/jwks", 200, &text("{\"keys\": []}"), "/jwks"),
        ("keys that are none", "/jwks", 200, &text("{\"keys\": 5}"), "/jwks"),
        ("404 for keys", "/jwks", 404, &text("{}"), "404"),
        ("a redirect for keys", "/jwks", 307, &elsewhere, "/jwks"),
        ("2 MiB of keys", "/jwks", 200, &long_set, "/jwks"),
    ];
    for (what, path, status, body, why) in rows {
        let issuer = Issuer::start();
        issuer.answer(path, status, &body(&issuer.url()));
        issuer.answer("/elsewhere", 200, &jwks(&issuer.url()));
        let relay = Relay::start(&issuer);
        refused(&relay, what, &issuer.token(), 503, "keys");
        let line = relay.log.wait("could not fetch keys ");
        assert!(line.contains(why), "{what}: no {why:?} in {line}");
        assert!(!issuer.requests().contains(&"/elsewhere".into()), "{what}");
    }
}

#[test]
fn an_issuer_that_says_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let issuer = Issuer::start();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let relay = Setup::new(&issuer).set("ISSUER", &url).start();
    refused(&relay, "a token", &issuer.token_with(json!({"iss": url})), 503, "keys");
    relay.log.wait("could not fetch keys ");
}

#[test]
fn an_unknown_key_costs_one_fetch() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let token = keys().unpublished.sign(raw_claims(&issuer.claims(json!({})))).unwrap();
    // Who asks while the first fetch is not over gets its answer from that.
    eventually("a second fetch", LIMIT, || {
        refused(&relay, "an unknown key", &token, 401, "publishes no key");
        fetches(&issuer) == 2
    });
    let start = Instant::now();
    for _ in 0..10 {
        refused(&relay, "an unknown key", &token, 401, "publishes no key");
    }
    relay.connect(&issuer.token()).close();
    assert!(start.elapsed() < Duration::from_secs(10), "it waits for what does not happen");
    assert_eq!(fetches(&issuer), 2);
}

#[test]
fn a_new_key_is_fetched_when_a_token_needs_it() {
    let issuer = Issuer::start();
    let set = |key: String| json!({"keys": [jwk(&key, json!({}))]}).to_string();
    issuer.answer("/jwks", 200, &set(keys().rsa.public_key().to_jwk()));
    let relay = Relay::start(&issuer);
    // Once a token has had its answer, the first fetch is over.
    relay.connect(&keys().rsa.sign(raw_claims(&issuer.claims(json!({})))).unwrap()).close();
    issuer.answer("/jwks", 200, &set(keys().unpublished.public_key().to_jwk()));
    let token = keys().unpublished.sign(raw_claims(&issuer.claims(json!({})))).unwrap();
    relay.connect(&token).close();
    assert_eq!(fetches(&issuer), 2);
}

#[test]
fn keys_are_fetched_again_when_they_have_aged() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("JWKS_CACHE_TTL_SECS", "1").start();
    relay.connect(&issuer.token()).close();
    let rsa = jwk(&keys().rsa.public_key().to_jwk(), json!({}));
    issuer.answer("/jwks", 200, &json!({"keys": [rsa]}).to_string());
    let before = fetches(&issuer);
    eventually("two more fetches", LIMIT, || fetches(&issuer) >= before + 2);
    refused(&relay, "a key that was taken back", &issuer.token(), 401, "publishes no key");
}

/// On an address where no other test listens or connects from, so that the port stays free.
#[test]
fn an_issuer_that_is_late() {
    let issuer = Issuer::on("127.0.0.2:0");
    let address = issuer.url().replace("http://", "");
    let (setup, token) = (Setup::new(&issuer), issuer.token());
    drop(issuer);
    eventually("the issuer is gone", LIMIT, || TcpStream::connect(&address).is_err());
    let relay = setup.start();
    relay.log.wait("could not fetch keys ");
    refused(&relay, "a token", &token, 503, "keys");
    let _issuer = Issuer::on(&address);
    eventually("the token works", LIMIT, || {
        let mut stream = relay.tcp();
        std::io::Write::write_all(&mut stream, &request(&token)).unwrap();
        read_head(&mut stream).starts_with("HTTP/1.1 101 ")
    });
}

#[test]
fn an_issuer_that_is_gone() {
    let issuer = Issuer::on("127.0.0.3:0");
    let address = issuer.url().replace("http://", "");
    let relay = Relay::start(&issuer);
    relay.log.wait("fetched keys ");
    let token = issuer.token();
    let unknown = keys().unpublished.sign(raw_claims(&issuer.claims(json!({})))).unwrap();
    drop(issuer);
    eventually("the issuer is gone", LIMIT, || TcpStream::connect(&address).is_err());
    refused(&relay, "an unknown key", &unknown, 401, "publishes no key");
    relay.log.wait("could not fetch keys ");
    relay.connect(&token).close();
}
