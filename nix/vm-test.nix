# On NixOS: three machines with the module, one plain, one behind nginx with TLS and one with a store for a rule, and a
# fourth that builds on them, knowing only tokens.
{ lib, pkgs, ... }:
let
  inherit (import ./. { inherit pkgs; }) nix-relay nix-relay-client;
  client-sh = pkgs.callPackage ./client.nix { };
  issuer = nix-relay.overrideAttrs {
    pname = "nix-relay-issuer";
    cargoBuildFlags = [ "--example=issuer" ];
    doCheck = false;
    doInstallCheck = false;
    postInstall = "install -Dt $out/bin target/*/release/examples/issuer";
  };
  certificate = pkgs.runCommand "certificate" { nativeBuildInputs = [ pkgs.openssl ]; } ''
    mkdir $out
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -keyout $out/key.pem \
      -out $out/cert.pem -subj /CN=tls -addext subjectAltName=DNS:tls -addext basicConstraints=critical,CA:FALSE
  '';

  # These machines reach no cache; so Nix must not wait for one.
  alone.nix.settings = {
    experimental-features = [ "nix-command" ];
    substituters = lib.mkForce [ ];
  };
  builder = {
    imports = [
      ./module.nix
      alone
    ];
    services.nix-relay = {
      enable = true;
      keepResults = 1;
      settings.auth = {
        issuer = "http://127.0.0.1:8000";
        allowed_org = lib.mkDefault "example-org";
      };
    };
    systemd.services.issuer = {
      wantedBy = [ "multi-user.target" ];
      before = [ "nix-relay.service" ];
      serviceConfig.ExecStart = "${issuer}/bin/issuer 127.0.0.1:8000";
    };
    environment.systemPackages = [
      pkgs.curl
      pkgs.jq
    ];
  };
in
{
  name = "nix-relay";

  nodes.plain = {
    imports = [ builder ];
    services.nix-relay.openFirewall = true;
  };

  nodes.tls = {
    imports = [ builder ];
    services.nix-relay = {
      socketActivation = true;
      nginx.enable = true;
      nginx.domain = "tls";
    };
    services.nginx.virtualHosts.tls = {
      enableACME = false;
      sslCertificate = "${certificate}/cert.pem";
      sslCertificateKey = "${certificate}/key.pem";
      locations."= /own".return = "200 yes";
    };
    networking.firewall.allowedTCPPorts = [ 443 ];
  };

  nodes.stores = {
    imports = [ builder ];
    services.nix-relay = {
      openFirewall = true;
      settings.auth.allowed_org = "";
      stores.main.rule.bound_claims.repository_owner = "example-org";
      stores.main.size = "500M";
    };
  };

  nodes.runner = {
    imports = [
      ./client-module.nix
      alone
    ];
    services.nix-relay-client = {
      enable = true;
      url = "ws://plain:8080";
      tokenFile = "/run/token";
    };
    environment.systemPackages = [ nix-relay-client ];
    environment.etc."client.sh".source = lib.getExe client-sh;
    environment.etc."hello.nix".text = ''
      derivation {
        name = "hello";
        system = builtins.currentSystem;
        builder = "/bin/sh";
        args = [ "-c" "echo hello > $out" ];
      }
    '';
  };

  testScript = ''
    start_all()
    runner.wait_for_unit("multi-user.target")
    tls.wait_for_unit("nginx.service")
    ca = "SSL_CERT_FILE=${certificate}/cert.pem"

    for relay, url, audience, clients in [
        (plain, "ws://plain:8080", "api://nix-relay", ["nix-relay-client", "/etc/client.sh"]),
        (tls, "wss://tls", "https://tls", ["nix-relay-client"]),
    ]:
        relay.wait_for_unit("nix-relay.service")
        relay.wait_for_open_port(8000)
        relay.succeed("systemd-analyze security --threshold=15 nix-relay.service")
        token = relay.succeed(
            "curl -sSf -H 'Authorization: Bearer request-token-of-the-job' "
            f"'http://127.0.0.1:8000/token?audience={audience}' | jq -r .value"
        ).strip()
        job = f"{ca} NIX_RELAY_URL={url} NIX_RELAY_TOKEN={token} "

        for client in clients:
            remote = f"--store 'ssh-ng://localhost?remote-program={client}'"
            path = runner.succeed(
                f"{job} nix build {remote} --eval-store auto --no-link --print-out-paths -f /etc/hello.nix"
            ).strip()
            relay.succeed(f"grep hello {path}")
            runner.fail(f"test -e {path}")
            # It has a root.
            relay.fail(f"nix-store --delete {path}")

            # Whoever comes through the relay is not trusted; whoever has no token does not come through.
            runner.succeed(f"{job} nix store info --json {remote} | grep -E '\"trusted\": ?(0|false)'")
            runner.fail(f"{job} NIX_RELAY_TOKEN=wrong nix store info {remote}")

    # In a store of its own, a job is trusted, and its paths are in no other.
    stores.wait_for_unit("nix-relay.service")
    stores.wait_for_open_port(8000)
    token = stores.succeed(
        "curl -sSf -H 'Authorization: Bearer request-token-of-the-job' "
        "'http://127.0.0.1:8000/token?audience=api://nix-relay' | jq -r .value"
    ).strip()
    job = f"NIX_RELAY_URL=ws://stores:8080 NIX_RELAY_TOKEN={token} "
    remote = "--store 'ssh-ng://localhost?remote-program=nix-relay-client'"
    path = runner.succeed(
        f"{job} nix build {remote} --eval-store auto --no-link --print-out-paths -f /etc/hello.nix"
    ).strip()
    stores.succeed(f"grep hello /var/lib/nix-relay/main{path}")
    stores.fail(f"test -e {path}")
    runner.succeed(f"{job} nix store info --json {remote} | grep -E '\"trusted\": ?(1|true)'")
    stores.succeed("mountpoint /var/lib/nix-relay/main")
    stores.succeed("systemctl start nix-relay-gc-main.service")
    stores.fail(f"test -e /var/lib/nix-relay/main{path}")

    # As one of the builders, plain builds for whoever asks nix-daemon.
    token = plain.succeed(
        "curl -sSf -H 'Authorization: Bearer request-token-of-the-job' "
        "'http://127.0.0.1:8000/token?audience=api://nix-relay' | jq -r .value"
    ).strip()
    runner.succeed(f"umask 077; echo {token} >/run/token")
    path = runner.succeed(
        "nix build --store daemon --max-jobs 0 --no-link --print-out-paths -f /etc/hello.nix"
    ).strip()
    runner.succeed(f"grep hello {path}")

    # Nothing else is there to be seen, but what the operator adds.
    runner.succeed("test $(curl -sk -o /dev/null -w '%{http_code}' https://tls/healthz) = 404")
    runner.succeed("curl -sSfk https://tls/own | grep yes")

    # A restart refuses nobody.
    tls.succeed("systemctl restart --no-block nix-relay.service; curl -sSf http://127.0.0.1:8080/healthz")

    # It hears SIGTERM, and ends well.
    plain.succeed("systemctl stop nix-relay.service")
    plain.fail("systemctl is-failed nix-relay.service")
  '';
}
