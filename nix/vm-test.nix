# On NixOS: a machine with the module, and another that builds on it, knowing only a token.
{ lib, pkgs, ... }:
let
  inherit (import ./. { inherit pkgs; }) nix-relay nix-relay-client;
  issuer = nix-relay.overrideAttrs {
    pname = "nix-relay-issuer";
    cargoBuildFlags = [ "--example=issuer" ];
    doCheck = false;
    postInstall = "install -Dt $out/bin target/*/release/examples/issuer";
  };
  # Nobody is asked for what has to be built.
  alone.nix.settings = {
    experimental-features = [ "nix-command" ];
    substituters = lib.mkForce [ ];
  };
in
{
  name = "nix-relay";

  nodes.relay = {
    imports = [
      ./module.nix
      alone
    ];
    services.nix-relay = {
      enable = true;
      openFirewall = true;
      settings.auth = {
        issuer = "http://127.0.0.1:8000";
        allowed_org = "example-org";
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

  nodes.runner = {
    imports = [ alone ];
    environment.systemPackages = [ nix-relay-client ];
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
    relay.wait_for_unit("nix-relay.service")
    relay.wait_for_open_port(8000)
    relay.succeed("systemd-analyze security --threshold=15 nix-relay.service")
    token = relay.succeed(
        "curl -sSf -H 'Authorization: Bearer request-token-of-the-job' "
        "'http://127.0.0.1:8000/token?audience=api://nix-relay' | jq -r .value"
    ).strip()

    remote = "--store 'ssh-ng://localhost?remote-program=nix-relay-client'"
    job = f"NIX_RELAY_URL=ws://relay:8080 NIX_RELAY_TOKEN={token} "
    runner.wait_for_unit("multi-user.target")
    path = runner.succeed(
        f"{job} nix build {remote} --eval-store auto --no-link --print-out-paths -f /etc/hello.nix"
    ).strip()
    relay.succeed(f"grep hello {path}")
    runner.fail(f"test -e {path}")

    # Whoever comes through the relay is not trusted; whoever has no token does not come through.
    runner.succeed(f"{job} nix store info --json {remote} | grep -E '\"trusted\": ?(0|false)'")
    runner.fail(f"{job} NIX_RELAY_TOKEN=wrong nix store info {remote}")

    # It hears SIGTERM, and ends well.
    relay.succeed("systemctl stop nix-relay.service")
    relay.fail("systemctl is-failed nix-relay.service")
  '';
}
