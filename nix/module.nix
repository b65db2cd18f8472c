# services.nix-relay: the unit that the package brings, and what the rest of the machine must know of it.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.nix-relay;
  toml = pkgs.formats.toml { };

  # The file from which the binary has its defaults.
  defaults = lib.importTOML ../config.example.toml;
  get =
    table: key:
    let
      value = cfg.settings.${table}.${key};
    in
    if value == null then defaults.${table}.${key} else value;

  listen = get "server" "listen";
  # Host and port; null if it is not that.
  address =
    let
      parts = builtins.match "(.+):0*([1-9][0-9]{0,4})" listen;
    in
    if parts == null || port parts > 65535 then null else parts;
  port = parts: lib.toInt (lib.last parts);
  isLocal =
    address != null && builtins.match "127\\..*|localhost|\\[::1]" (builtins.head address) != null;
  # systemd looks up no names.
  isNumeric =
    address != null && builtins.match "[0-9.]+|\\[[0-9a-fA-F:.]+]" (builtins.head address) != null;

  # What is not set is left to the binary.
  isSet =
    name: value:
    value != null && !(name == "rule" && value == [ ]) && !(name == "jwks_files" && value == { });
  written = lib.filterAttrsRecursive isSet (
    lib.recursiveUpdate cfg.settings { auth.rule = map (lib.filterAttrs isSet) cfg.settings.auth.rule; }
  );

  claim = types.oneOf [
    types.str
    types.int
    types.bool
  ];
  seconds =
    description:
    mkOption {
      type = types.nullOr types.ints.unsigned;
      default = null;
      inherit description;
    };

  configFile =
    pkgs.runCommand "nix-relay.toml"
      {
        written = toml.generate "nix-relay.toml" written;
        # What cannot run here checks it when it starts.
        check = lib.optionalString (pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform) (
          lib.getExe cfg.package
        );
      }
      ''
        if [ "$check" ]; then "$check" --check "$written"; fi
        cp "$written" "$out"
      '';
in
{
  options.services.nix-relay = {
    enable = lib.mkEnableOption "nix-relay, through which CI jobs that hold an OIDC token build on this machine";

    package = mkOption {
      type = types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalMD "nix-relay, built from where this module is";
      description = "The nix-relay to run.";
    };

    settings = mkOption {
      description = ''
        The configuration file; README.md of nix-relay says what each key means. What is not set here is what the
        binary has for a default, but for `daemon.nix_daemon_path`, which comes from `nix.package`.
      '';
      example = {
        auth.allowed_org = "your-organisation";
        daemon.max_connections = 64;
      };
      default = { };
      type = types.submodule {
        freeformType = toml.type;
        options = {
          server.listen = mkOption {
            type = types.nullOr types.str;
            default = null;
            example = "[::]:8080";
            description = "Address or host name, and port.";
          };
          server.shutdown_grace_secs = seconds "How long running sessions may go on after SIGTERM.";
          daemon.timeout_secs = seconds "The longest session.";
          daemon.queue_timeout_secs = seconds "How long a client may wait for a session to end.";
          auth.allowed_org = mkOption {
            type = types.nullOr types.str;
            default = null;
            example = "your-organisation";
            description = "Whose jobs may build here: the `repository_owner` of their tokens, letter case aside.";
          };
          auth.jwks_files = mkOption {
            type = types.attrsOf types.path;
            default = { };
            example."https://kubernetes.default.svc" = "/etc/nix-relay/kubernetes.json";
            description = "Files with the keys of issuers from which the relay cannot fetch them.";
          };
          auth.rule = mkOption {
            description = "Who else may; the first rule that matches decides.";
            default = [ ];
            type = types.listOf (
              types.submodule {
                freeformType = toml.type;
                options.name = mkOption {
                  type = types.str;
                  example = "main";
                  description = "What the log calls it.";
                };
                options.bound_claims = mkOption {
                  type = types.attrsOf (types.either claim (types.listOf claim));
                  default = { };
                  example = {
                    namespace_path = "group";
                    ref = [
                      "main"
                      "release-*"
                    ];
                  };
                  description = "What the claims of a token must be, all of them; nix/providers.md has patterns.";
                };
                options.max_connections = mkOption {
                  type = types.nullOr types.ints.positive;
                  default = null;
                  description = "How many sessions those whom it lets in may have at once.";
                };
              }
            );
          };
        };
      };
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Whether the firewall lets the port of `settings.server.listen` be reached.";
    };

    socketActivation = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether systemd holds the port, so that connections wait while the relay restarts, and none is refused. Once
        `settings.server.listen` has changed, this takes `systemctl restart nix-relay.socket`: NixOS leaves a socket that
        is in use as it is.
      '';
    };

    trustClients = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether nix-daemon trusts the clients of the relay as it does `nix.settings.trusted-users`. They may then add
        store paths that nobody signed, and can become root on this machine.
      '';
    };

    nginx.enable = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether nginx does TLS for the relay, which then listens on loopback. The certificate is ACME's unless
        `services.nginx.virtualHosts.<domain>` says otherwise.
      '';
    };

    nginx.domain = mkOption {
      type = types.str;
      example = "relay.example.com";
      description = "The name by which clients reach the relay.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.settings.auth.allowed_org != null || cfg.settings.auth.rule != [ ];
        message = "Nobody could connect to nix-relay: set services.nix-relay.settings.auth.allowed_org to the organisation whose jobs may, or services.nix-relay.settings.auth.rule.";
      }
      {
        assertion = builtins.all (rule: rule.bound_claims != { }) cfg.settings.auth.rule;
        message = "A rule of nix-relay would let everybody in: set bound_claims in each of services.nix-relay.settings.auth.rule.";
      }
      {
        assertion = address != null;
        message = "nix-relay cannot listen on \"${listen}\": set services.nix-relay.settings.server.listen to HOST:PORT or [IPV6]:PORT.";
      }
      {
        assertion = cfg.openFirewall -> !isLocal;
        message = "services.nix-relay.openFirewall is of no use while only this machine reaches ${listen}: set services.nix-relay.settings.server.listen to another address, or with nginx set networking.firewall.allowedTCPPorts = [ 80 443 ] instead.";
      }
      {
        assertion = cfg.nginx.enable -> isLocal;
        message = "With services.nix-relay.nginx.enable, tokens need not pass ${listen} unencrypted: set services.nix-relay.settings.server.listen to an address of loopback, or not at all.";
      }
      {
        assertion = cfg.socketActivation -> isNumeric;
        message = "systemd cannot listen on the name in \"${listen}\" for nix-relay: set services.nix-relay.settings.server.listen to an IP address and port, or services.nix-relay.socketActivation to false.";
      }
    ];

    services.nix-relay.settings = {
      daemon.nix_daemon_path = lib.mkDefault (lib.getExe' config.nix.package "nix-daemon");
      server.listen = lib.mkIf cfg.nginx.enable (lib.mkDefault "127.0.0.1:8080");
    };

    users.users.nix-relay = {
      isSystemUser = true;
      group = "nix-relay";
    };
    users.groups.nix-relay = { };
    nix.settings.extra-allowed-users = [ "nix-relay" ];
    nix.settings.extra-trusted-users = lib.mkIf cfg.trustClients [ "nix-relay" ];

    # The units of the package, with what is different here; all else is said there. Without `asDropin`, NixOS would
    # make a unit of this alone where the package brings none, and run the relay as root.
    systemd.packages = [ cfg.package ];
    systemd.services.nix-relay = {
      overrideStrategy = "asDropin";
      wantedBy = [ "multi-user.target" ];
      requires = lib.mkIf cfg.socketActivation [ "nix-relay.socket" ];
      # At a switch, the old relay goes on until the new one can start.
      stopIfChanged = false;
      environment = lib.mapAttrs (_: lib.mkDefault) (
        config.networking.proxy.envVars
        // {
          # With those of security.pki.
          SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt";
        }
      );
      serviceConfig = {
        ExecStart = [
          ""
          "${lib.getExe cfg.package} ${configFile}"
        ];
        # After the grace, sessions have 19 seconds to end.
        TimeoutStopSec = lib.mkDefault (get "server" "shutdown_grace_secs" + 30);
      };
    };
    systemd.sockets.nix-relay = lib.mkIf cfg.socketActivation {
      overrideStrategy = "asDropin";
      wantedBy = [ "sockets.target" ];
      socketConfig.ListenStream = [
        ""
        listen
      ];
    };

    networking.firewall.allowedTCPPorts = lib.mkIf (cfg.openFirewall && address != null) [
      (port address)
    ];

    services.nginx = lib.mkIf cfg.nginx.enable {
      enable = true;
      virtualHosts.${cfg.nginx.domain} = {
        enableACME = lib.mkDefault true;
        forceSSL = lib.mkDefault true;
        # Tokens may be long.
        extraConfig = "large_client_header_buffers 4 16k;";
        locations."/".return = "404";
        locations."= /relay" = {
          proxyPass = "http://${listen}";
          proxyWebsockets = true;
          # They would have the relay believe where a client says that it comes from.
          recommendedProxySettings = false;
          # The longest session, and the wait before it.
          extraConfig =
            let
              seconds = toString (get "daemon" "timeout_secs" + get "daemon" "queue_timeout_secs" + 60);
            in
            ''
              proxy_set_header X-Forwarded-For $remote_addr;
              proxy_buffer_size 64k;
              proxy_buffers 8 64k;
              proxy_read_timeout ${seconds}s;
              proxy_send_timeout ${seconds}s;
              send_timeout ${seconds}s;
            '';
        };
      };
    };
  };
}
